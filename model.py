"""
The network: YOLOv8, with a gated sparse global attention block at P5 and P4. Small to large; the last class is the
model.

    python model.py                                    the layer table, scale l at 1088x1920
    python model.py --scale=n --imgsz=640 --attn=---   any other

`HSVDET(HSVDETConfig())(images, targets)` returns raw maps and losses; `detect(images)` is what `generate` is to a
language model. Input sides must be multiples of 32 (1,080 rows do not: layer 16 would join 136 rows with 135).

A detector, here and in baselines/, is `forward(images, targets=None) -> raw, losses` and `postprocess(raw, ...) ->`
a list of (n, 6); what else train, eval, detect and export ask for is what baselines/detr.py's DETR has.

With attn='---' this is YOLOv8 layer for layer, and `from_pretrained` reads its published checkpoints. What YOLOv8 is we
know from papers, tables and the arrays under tests/reference, to which tests/test_model.py holds this file equal.

Papers: cross-stage partial networks, Wang et al. 2019 (1911.11929); SPP, He et al. 2014 (1406.4729); PAN, Liu et al.
2018 (1803.01534); anchor-free points, FCOS, Tian et al. 2019 (1904.01355); distribution focal loss, Li et al. 2020
(2006.04388); one-to-one head, YOLOv10, Wang et al. 2024 (2405.14458). The block has its own file.
"""
import contextlib
import copy
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import HELP, make_block, selecting
from checkpoint import fill, read_weights
from configurator import InputError, build, configure
from loss import box_iou, decode_boxes, detection_loss, flatten_maps, make_anchor_points
from sparse_attention import autocast_off, sincos_2d, stable_topk

SCALES = {                                                           # depth, width, largest channel count before width
    'n': (0.33, 0.25, 1024),
    's': (0.33, 0.50, 1024),
    'm': (0.67, 0.75, 768),
    'l': (1.00, 1.00, 512),
    'x': (1.00, 1.25, 512),
}


@dataclass
class HSVDETConfig:
    scale: str = 'n'                                                                  # n s m l x
    num_classes: int = 80
    attn: str = '-SS'                # a letter each for P3 P4 P5: '-' none, 'S' sparse, 'F' full, more in attention.py
    k: int | float | tuple = 512        # tokens that attend: a count, a fraction below 1, 0 for all; or three: P3 P4 P5
    select: str = 'l2sq'                                                              # l2sq l2 random learned
    gate: str = 'learned'                                                             # learned fixed none
    heads: int = 1                                                                    # attention heads
    pos: bool = False                                                                 # positional encoding of q and k
    one2one: bool = False                                                             # a second head that needs no NMS
    keep: str = ''     # 'mass:0.5': of the k those that hold half of the importance; 'joint': P4 and P5 share their k's
    memory: str = ''   # 'scale': P4's tokens attend to P5's too; 'time': to those of earlier frames; or 'scale,time'.
    #                    With ':shuffled' (the control; batches of 2 or more) they get the tokens of another image
    frames: int = 2                                                                   # earlier frames that 'time' keeps
    kernel: str = 'epanechnikov'                                                      # of K: epanechnikov linear

    def __post_init__(self):
        for ok, message in (
                (self.scale in SCALES, f'scale must be one of n s m l x, got {self.scale!r}'),
                (type(self.num_classes) is int and self.num_classes >= 1,
                 f'num_classes must be at least 1, got {self.num_classes!r}'),
                (len(self.attn) == 3 and set(self.attn) <= set(HELP),
                 f'attn has one of {" ".join(HELP)} for each of P3 P4 P5, got {self.attn!r}'),
                (all(type(k) is int and k >= 0 or type(k) is float and 0 < k < 1 for k in self.each_k()),
                 f'k must be a count, a fraction below 1, or 0 for all, or three of them for P3 P4 P5, got {self.k!r}'),
                (self.select in ('l2sq', 'l2', 'random', 'learned'),
                 f'select must be l2sq, l2, random or learned, got {self.select!r}'),
                (self.gate in ('learned', 'fixed', 'none'), f'gate must be learned, fixed or none, got {self.gate!r}'),
                (self.kernel in ('epanechnikov', 'linear'),
                 f'kernel must be epanechnikov or linear, got {self.kernel!r}'),
                (self.heads in (1, 2, 4, 8, 16), f'heads must be 1, 2, 4, 8 or 16, got {self.heads!r}'),
                (re.fullmatch(r'(mass:(0?\.\d*[1-9]\d*|1|1\.0*)|joint)?', self.keep),
                 f"keep must be 'mass:0.5' (a share up to 1), 'joint' or nothing, got {self.keep!r}"),
                (not self.keep or self.select != 'random', f'keep={self.keep} needs an importance: select=l2sq'),
                (not self.keep or set(self.attn) & set('STP'),
                 f'keep={self.keep} needs attn S, T or P somewhere, got attn={self.attn}'),
                (self.keep != 'joint' or set(self.attn[1:]) <= set('STP') and self.select != 'learned'
                 and all(type(k) is int and k > 0 for k in self.each_k()[1:]),
                 'keep=joint needs attn S, T or P at P4 and P5, select=l2sq or l2, and k as counts, '
                 f'got attn={self.attn}, select={self.select}, k={self.k}'),
                (re.fullmatch(r'((scale|time|scale,time)(:shuffled)?)?', self.memory),
                 f"memory must be 'scale', 'time', 'scale,time', one of them with ':shuffled', or nothing, "
                 f'got {self.memory!r}'),
                ('scale' not in self.memory or set(self.attn[1:]) <= set('SFTP'),
                 f'memory={self.memory} needs attn S, F, T or P at P4 and P5, got attn={self.attn}'),
                ('time' not in self.memory or set(self.attn[1:]) & set('SFTP'),
                 f'memory={self.memory} needs attn S, F, T or P at P4 or P5, got attn={self.attn}'),
                (type(self.frames) is int and self.frames >= 1, f'frames must be at least 1, got {self.frames!r}')):
            if not ok:
                raise InputError(message)

    def each_k(self):
        """k for P3, P4, P5."""
        k = self.k if isinstance(self.k, tuple) else (self.k,) * 3
        if len(k) != 3:
            raise InputError(f'k must be one number, or three for P3 P4 P5, got {self.k!r}')
        return k


# --- layers ----------------------------------------------------------------------------------------------------------

class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU. (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)"""

    def __init__(self, c_in, c_out, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def fuse(self):
        """A BatchNorm that no longer learns is a factor and a shift per channel: both move into the convolution."""
        factor = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)       # (c_out,)
        bias = self.bn.bias - self.bn.running_mean * factor
        self.conv.weight = nn.Parameter((self.conv.weight * factor[:, None, None, None]).detach())
        self.conv.bias = nn.Parameter(bias.detach())
        self.bn = nn.Identity()


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a residual where `shortcut` says so."""

    def __init__(self, c, shortcut):
        super().__init__()
        self.conv1 = Conv(c, c, 3)
        self.conv2 = Conv(c, c, 3)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """
    A cross-stage partial block: half of the channels pass by, half go through n bottlenecks; all n + 2 pieces are
    joined at the end.
    """

    def __init__(self, c_in, c_out, n, shortcut):
        super().__init__()
        c = c_out // 2
        self.conv_in = Conv(c_in, 2 * c)
        self.conv_out = Conv((2 + n) * c, c_out)
        self.blocks = nn.ModuleList(Bottleneck(c, shortcut) for _ in range(n))

    def forward(self, x):
        pieces = list(self.conv_in(x).chunk(2, 1))
        for block in self.blocks:
            pieces.append(block(pieces[-1]))
        return self.conv_out(torch.cat(pieces, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: three 5x5 max pools in a row see 5, 9 and 13 cells; joined with their input."""

    def __init__(self, c_in, c_out, kernel=5):
        super().__init__()
        self.conv_in = Conv(c_in, c_in // 2)
        self.conv_out = Conv(c_in // 2 * 4, c_out)
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x):
        x = self.conv_in(x)
        y = self.pool(x)
        z = self.pool(y)
        return self.conv_out(torch.cat((x, y, z, self.pool(z)), 1))


class Concat(nn.Module):
    """torch.cat over channels, as a module so that the layer table can name it."""

    def forward(self, *maps):
        return torch.cat(maps, 1)


def head_branch(c_in, c, c_out):
    return nn.Sequential(Conv(c_in, c, 3), Conv(c, c, 3), nn.Conv2d(c, c_out, 1))


class Detect(nn.Module):
    """
    The head: for each of P3, P4, P5 a box branch (4 distances x 16 bins) and a class branch (K logits), decoupled and
    anchor-free. Three maps (B, c, H, W) -> three raw maps (B, 64 + K, H, W).
    """

    def __init__(self, channels, K):
        super().__init__()
        c_box, c_cls = max(channels[0] // 4, 64), max(channels[0], min(K, 100))
        self.box = nn.ModuleList(head_branch(c, c_box, 64) for c in channels)
        self.cls = nn.ModuleList(head_branch(c, c_cls, K) for c in channels)
        # 0..15: what a bin stands for. Nothing reads it; a parameter because the published counts include these 16
        self.bins = nn.Parameter(torch.arange(16.0), requires_grad=False)
        for stride, box, cls in zip((8, 16, 32), self.box, self.cls, strict=True):
            nn.init.constant_(box[-1].bias, 1.0)
            nn.init.constant_(cls[-1].bias, math.log(5 / K / (640 / stride) ** 2))    # about 5 objects in a 640 image

    def forward(self, *maps):
        return [torch.cat((box(x), cls(x)), 1) for x, box, cls in zip(maps, self.box, self.cls, strict=True)]


# --- non-maximum suppression -----------------------------------------------------------------------------------------

@torch.no_grad()
def nms(boxes, scores, labels, iou_threshold, max_det=300):
    """
    Exact greedy NMS. boxes (P, 4) xyxy, scores (P,), labels (P,) -> indices of the kept boxes by falling score, at most
    max_det; of equal scores the lower index comes first. A kept box suppresses every box of its class that comes after
    it and overlaps it by more than iou_threshold.

    Labels are compared directly. (The usual trick, shifting each class's boxes by 7,680 px so that classes never
    overlap, leaves float32 a grid of 1/16 px and overflows float16 from class 9 on.) Candidates are processed in blocks
    in order of score: drop those that an already kept box suppresses, then run greedy NMS within the block. It stops
    once max_det boxes are kept. Memory is bounded by (kept + block) x block; no time limit ends it early.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order].float(), labels[order]
    kept = order.new_zeros(0)                                                         # positions in the sorted list
    block, first = 256, 0

    def suppresses(a, b):
        """(len(a), len(b)): does box a suppress box b?"""
        return (box_iou(boxes[a], boxes[b]) > iou_threshold) & (labels[a, None] == labels[b])

    while first < len(order) and len(kept) < max_det:
        new = torch.arange(first, min(first + block, len(order)), device=boxes.device)
        if len(kept):
            new = new[~suppresses(kept, new).any(0)]
        # Greedy NMS on a matrix: a candidate stays unless one that stays suppresses it. Start with "all stay" and
        # repeat. After t rounds the first t candidates are final, so this ends, in practice within a few rounds.
        m = suppresses(new, new).triu_(1)
        stay = torch.ones(len(new), dtype=torch.bool, device=boxes.device)
        while True:
            again = ~(m & stay[:, None]).any(0)
            if torch.equal(again, stay):
                break
            stay = again
        kept = torch.cat((kept, new[stay]))
        first += block
        block = min(2 * block, 1024)
    return order[kept[:max_det]]


def select_detections(boxes, scores, conf, iou, max_det, multi_label, use_nms, max_candidates=30000):
    """One image: boxes (A, 4), scores (A, K) -> (n, 6) rows x1, y1, x2, y2, score, class, by falling score."""
    if multi_label:                                                                  # a point may name several classes
        point, label = (scores > conf).nonzero(as_tuple=True)
        score = scores[point, label]
    else:
        score, label = scores.max(1)
        point = (score > conf).nonzero()[:, 0]
        score, label = score[point], label[point]
    if len(point) > max_candidates:
        best = score.argsort(descending=True, stable=True)[:max_candidates]
        point, label, score = point[best], label[best], score[best]
    if use_nms:
        keep = nms(boxes[point], score, label, iou, max_det)
    else:
        keep = score.argsort(descending=True, stable=True)[:max_det]
    return torch.cat((boxes[point[keep]], score[keep, None], label[keep, None].to(boxes.dtype)), 1)


# --- the model -------------------------------------------------------------------------------------------------------

def call(layer, *x):
    return layer(*x)


@contextlib.contextmanager
def freeze_bn_stats(layer):
    """While a layer is recomputed for the backward pass its BatchNorms must not count the batch a second time."""
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.num_batches_tracked -= 1


def recompute(layer, *x):
    """layer(*x), its inner activations dropped and computed again in the backward pass: less memory, more time."""
    return checkpoint(layer, *x, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), freeze_bn_stats(layer)))


def scale_dims(scale):
    """Channels of P1 to P5 at this scale, and a function from a C2f's number of bottlenecks at scale l to that here."""
    depth, width, largest = SCALES[scale]
    channels = [math.ceil(min(c, largest) * width / 8) * 8 for c in (64, 128, 256, 512, 1024)]
    return channels, lambda repeats: max(1, round(repeats * depth))


class Backbone(nn.Module):
    """
    images (B, 3, H, W) in 0..1 -> P3, P4, P5 at strides 8, 16, 32: rows 0 to 9 of the table below. What every detector
    of this repository stands on. channels: those of P3, P4, P5.
    """

    def __init__(self, scale):
        super().__init__()
        (c1, c2, c3, c4, c5), n = scale_dims(scale)
        self.channels = c3, c4, c5
        self.stem = Conv(3, c1, 3, 2)
        self.down2 = Conv(c1, c2, 3, 2)
        self.stage2 = C2f(c2, c2, n(3), True)
        self.down3 = Conv(c2, c3, 3, 2)
        self.stage3 = C2f(c3, c3, n(6), True)
        self.down4 = Conv(c3, c4, 3, 2)
        self.stage4 = C2f(c4, c4, n(6), True)
        self.down5 = Conv(c4, c5, 3, 2)
        self.stage5 = C2f(c5, c5, n(3), True)
        self.sppf = SPPF(c5, c5)

    def forward(self, x, run=call):
        x = run(self.stem, x)                                                         # (B, c1, H/2, W/2)
        p2 = run(self.stage2, run(self.down2, x))                                     # (B, c2, H/4, W/4)
        p3 = run(self.stage3, run(self.down3, p2))                                    # (B, c3, H/8, W/8)
        p4 = run(self.stage4, run(self.down4, p3))                                    # (B, c4, H/16, W/16)
        p5 = run(self.stage5, run(self.down5, p4))                                    # (B, c5, H/32, W/32)
        return p3, p4, run(self.sppf, p5)


class SelectedTokens(NamedTuple):
    """The tokens that a block selected in B images, for other blocks to attend to."""
    tokens: torch.Tensor                                                              # (B, k, C), of the block's output
    kept: torch.Tensor | None                                                         # (B, k) bool; None: all of them


class FrameEmbedding(nn.Module):
    """Adds a learned embedding of its age to what a block selected in each earlier frame, newest first; for attend."""

    def __init__(self, frames, c):
        super().__init__()
        self.code = nn.Parameter(torch.zeros(frames, c))

    def forward(self, earlier):
        return [(selected.tokens + self.code[age], selected.kept) for age, selected in enumerate(earlier)]


class HSVDET(nn.Module):
    """
    The table below is scale l at 1920x1088; tests hold it to the code, and `python model.py` prints it for any scale.

     # | from      | module     | args              | output        | name    |
     0 | -1        | Conv       | 64, 3, 2          |  64x544x960   | stem    |
     1 | -1        | Conv       | 128, 3, 2         | 128x272x480   | down2   |
     2 | -1        | C2f x3     | 128, True         | 128x272x480   | stage2  |
     3 | -1        | Conv       | 256, 3, 2         | 256x136x240   | down3   |
     4 | -1        | C2f x6     | 256, True         | 256x136x240   | stage3  | P3
     5 | -1        | Conv       | 512, 3, 2         | 512x68x120    | down4   |
     6 | -1        | C2f x6     | 512, True         | 512x68x120    | stage4  | P4
     7 | -1        | Conv       | 512, 3, 2         | 512x34x60     | down5   |
     8 | -1        | C2f x3     | 512, True         | 512x34x60     | stage5  |
     9 | -1        | SPPF       | 512, 5            | 512x34x60     | sppf    | P5
    10 | -1        | Sparse     | 512, k=512        | 512x34x60     | block5  | N = 2,040 tokens
    11 | -1        | Upsample   | x2 nearest        | 512x68x120    | up4     | top-down (FPN)
    12 | -1, 6     | Concat     |                   | 1024x68x120   | cat4    |
    13 | -1        | C2f x3     | 512, False        | 512x68x120    | fpn4    |
    14 | -1        | Sparse     | 512, k=512        | 512x68x120    | block4  | N = 8,160 tokens
    15 | -1        | Upsample   | x2 nearest        | 512x136x240   | up3     |
    16 | -1, 4     | Concat     |                   | 768x136x240   | cat3    |
    17 | -1        | C2f x3     | 256, False        | 256x136x240   | fpn3    | P3 out (block3 after it, if any)
    18 | -1        | Conv       | 256, 3, 2         | 256x68x120    | pan_down4 | bottom-up (PAN)
    19 | -1, 14    | Concat     |                   | 768x68x120    | pan_cat4  | joins the enriched P4
    20 | -1        | C2f x3     | 512, False        | 512x68x120    | pan4    | P4 out
    21 | -1        | Conv       | 512, 3, 2         | 512x34x60     | pan_down5 |
    22 | -1, 10    | Concat     |                   | 1024x34x60    | pan_cat5  | joins the enriched P5
    23 | -1        | C2f x3     | 512, False        | 512x34x60     | pan5    | P5 out
    24 | 17,20,23  | Detect     | nc                | P3, P4, P5    | detect_head |
    Attributes: cfg; names, a list of K class names; imgsz, the (H, W) it was trained at, or None; checkpointing, set it
    to recompute activations in the backward pass (less memory, about a third more time); nms, whether the answers are
    those of the one-to-many head, cleaned by NMS (True), or those of the one-to-one head where there is one, as they
    are (False); fixed_imgsz, the only (H, W) it takes, or None for any; frames, how many earlier frames it remembers.

    Memory. memory='scale': the tokens that P5's block selected, taken from its output, are extra keys and values for
    P4's block. A linear layer maps them to P4's width; its bias is the level embedding. memory='time': the tokens that
    a block selected in the last `frames` frames are extra keys and values for the same block, plus a learned embedding
    of their age. That state is passed in and returned (see forward_frame); it is None at the start of a clip. In
    training a sample is a whole clip (B, F, 3, H, W) and gradients flow through all of its frames; no state survives
    the step. With pos=True these tokens carry the positional encoding of their cell.
    """

    arch = 'hsvdet'            # in checkpoints and exported files
    LOSSES = ('box', 'cls', 'dfl')                                                    # of each part, for the log
    rect = True                # trained on squares it takes rectangles too: convolutions and blocks work on any H x W

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.names = [f'class{i}' for i in range(cfg.num_classes)]
        self.imgsz, self.fixed_imgsz, self.best_f1 = None, None, None
        self.frames = cfg.frames if 'time' in cfg.memory else 0
        self.checkpointing = False
        self.nms = True
        (_, _, c3, c4, c5), n = scale_dims(cfg.scale)

        k3, k4, k5 = cfg.each_k()
        block_cfg = cfg                                                               # k is set for each level below
        if cfg.keep == 'joint':                      # joint_counts divides one budget per image between both levels
            k4 = k5 = k4 + k5
            block_cfg = replace(cfg, keep='')
        self.backbone = Backbone(cfg.scale)
        self.block5 = make_block(cfg.attn[2], c5, replace(block_cfg, k=k5))

        self.up4 = nn.Upsample(scale_factor=2)
        self.cat4 = Concat()
        self.fpn4 = C2f(c5 + c4, c4, n(3), False)
        self.block4 = make_block(cfg.attn[1], c4, replace(block_cfg, k=k4))
        self.up3 = nn.Upsample(scale_factor=2)
        self.cat3 = Concat()
        self.fpn3 = C2f(c4 + c3, c3, n(3), False)
        self.block3 = make_block(cfg.attn[0], c3, replace(block_cfg, k=k3))
        self.pan_down4 = Conv(c3, c3, 3, 2)
        self.pan_cat4 = Concat()
        self.pan4 = C2f(c3 + c4, c4, n(3), False)
        self.pan_down5 = Conv(c4, c4, 3, 2)
        self.pan_cat5 = Concat()
        self.pan5 = C2f(c4 + c5, c5, n(3), False)

        self.detect_head = Detect((c3, c4, c5), cfg.num_classes)
        self.one2one_head = copy.deepcopy(self.detect_head) if cfg.one2one else None
        # Named as the blocks they belong to: these too are fresh in a model made from weights without them
        self.block4_scale = nn.Linear(c5, c4) if 'scale' in cfg.memory else None
        self.block4_time = FrameEmbedding(cfg.frames, c4) if 'time' in cfg.memory and selecting(self.block4) else None
        self.block5_time = FrameEmbedding(cfg.frames, c5) if 'time' in cfg.memory and selecting(self.block5) else None

    def blocks(self):
        """The attention blocks there are, by level: dict(p4=..., p5=...)."""
        blocks = dict(p3=self.block3, p4=self.block4, p5=self.block5)
        return {level: block for level, block in blocks.items() if block is not None}

    def run(self, layer, *x):
        """layer(*x); with `checkpointing` its inner activations are computed again in the backward pass."""
        return (recompute if self.checkpointing and self.training else call)(layer, *x)

    def attend(self, block, x, extra_tokens=(), count=None):
        """
        One block, if it is there, on x (B, C, H, W) -> its output, and its SelectedTokens or None. extra_tokens: pairs
        of tokens (B, T, C) and which of them count, (B, T) bool, or None for all. count (B,): see select_tokens.
        """
        mixer = selecting(block)
        if mixer is None or not (self.cfg.memory or self.cfg.keep):
            return x if block is None else block(x), None
        memory = memory_mask = None
        if extra_tokens:
            memory = torch.cat([tokens for tokens, _ in extra_tokens], 1)             # (B, T, C)
            if any(kept is not None for _, kept in extra_tokens):
                memory_mask = torch.cat([tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if kept is None else kept
                                         for tokens, kept in extra_tokens], 1)        # (B, T)
            if self.cfg.memory.endswith(':shuffled'):
                memory = memory.roll(1, 0)
                memory_mask = None if memory_mask is None else memory_mask.roll(1, 0)
        chosen = mixer.select_tokens(x, count)
        x = block(x, memory, memory_mask, chosen)
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2).gather(1, chosen.cells[..., None].expand(-1, -1, C))    # (B, k, C)
        if mixer.pos:
            tokens = tokens + sincos_2d(H, W, C, x.device).to(x.dtype)[chosen.cells]
        return x, SelectedTokens(tokens, chosen.kept)

    def joint_counts(self, p4, p5):
        """
        One budget of k4 + k5 tokens for both levels -> how many of them P4 and P5 keep, (B,) each.

        The importances of both maps are ranked together, and each level keeps as many tokens as it has among the first
        k4 + k5, at least one (attention over nothing is undefined). Norms of two levels are not comparable, so each
        map's are standardised first (mean 0, variance 1, per image). This happens before P5's block runs, so P4 is
        counted on the backbone's map; which tokens P4's block then keeps is decided on its own, fused input.
        """
        # both blocks measure importance alike, so either will do; eval.remove_blocks may have taken out one or both
        mixer = selecting(self.block4) or selecting(self.block5)
        if mixer is None:
            return None, None
        scores = [mixer.importance(x) for x in (p4, p5)]
        scores = [(s - s.mean(1, keepdim=True)) / s.std(1, keepdim=True, correction=0).clamp(min=1e-6) for s in scores]
        k, N = mixer.k, scores[0].shape[1]
        winners = stable_topk(torch.cat(scores, 1).float(), torch.sym_min(k, N + scores[1].shape[1]))  # (B, k4 + k5)
        n4 = (winners < N).sum(1)
        n4 = n4.clamp(1, winners.shape[1] - 1)
        return n4, winners.shape[1] - n4

    def top_down(self, images, state=None):
        """
        The first half of the network, up to block4: images (B, 3, H, W) in 0..1 -> maps (p3, n4, p5); and, with memory
        or keep, {'p4': SelectedTokens, 'p5': ...} of the blocks that select. Earlier frames of a clip need no more.

        state: what the blocks selected in earlier frames, {level: [SelectedTokens of the last frame, of the one before
        it, ...]}, see next_state; None at the start of a clip.
        """
        if torch.compiler.is_exporting() and 'time' in self.cfg.memory:
            raise InputError('memory=time carries a state from frame to frame, which no exported file holds: run the '
                             'checkpoint itself, or train without memory=time')

        def earlier(code, level):
            return code((state or {}).get(level, ())) if code else []

        p3, p4, p5 = self.backbone(images, self.run)
        n4_count, n5_count = self.joint_counts(p4, p5) if self.cfg.keep == 'joint' else (None, None)
        p5, selected5 = self.attend(self.block5, p5, earlier(self.block5_time, 'p5'), n5_count)
        # top-down: the deep maps know what things are and tell the shallow ones, which know where they are
        n4 = self.run(self.fpn4, self.cat4(self.up4(p5), p4))
        extra_tokens = earlier(self.block4_time, 'p4')
        if self.block4_scale is not None and selected5 is not None:                  # None: block5 was taken out
            extra_tokens.append((self.block4_scale(selected5.tokens), selected5.kept))
        n4, selected4 = self.attend(self.block4, n4, extra_tokens, n4_count)
        selected = dict(p4=selected4, p5=selected5)
        return (p3, n4, p5), {level: some for level, some in selected.items() if some is not None}

    def image_features(self, images, state=None):
        """images (B, 3, H, W) in 0..1 -> the three maps that the head sees, strides 8, 16, 32; and top_down's dict."""
        (p3, n4, p5), selected = self.top_down(images, state)
        n3 = self.run(self.fpn3, self.cat3(self.up3(n4), p3))
        if self.block3 is not None:
            n3 = self.block3(n3)
        # bottom-up: and back again
        m4 = self.run(self.pan4, self.pan_cat4(self.run(self.pan_down4, n3), n4))
        m5 = self.run(self.pan5, self.pan_cat5(self.run(self.pan_down5, m4), p5))
        return (n3, m4, m5), selected

    def forward_features(self, images):
        """images (B, 3, H, W), or clips (B, F, 3, H, W) -> the three maps, of a clip those of its last frame."""
        if images.ndim == 4:
            return self.image_features(images)[0]
        state = None
        for frame in images.unbind(1)[:-1]:
            state = self.next_state(state, self.top_down(frame, state)[1])
        return self.image_features(images[:, -1], state)[0]

    def next_state(self, state, selected):
        """The state before a frame (None at the start) and what the blocks selected in it -> the state after it."""
        return {level: [now, *(state or {}).get(level, ())][:self.cfg.frames] for level, now in selected.items()}

    def forward_frame(self, images, state=None):
        """
        The next frame of B videos (B, 3, H, W) -> raw maps as forward's, and the state to pass in with the frame after
        it. None is the state before the first frame.
        """
        features, selected = self.image_features(images, state)
        return self.inference_head()(*features), self.next_state(state, selected)

    def inference_head(self):
        """The head whose output is decoded at inference: see `nms` above."""
        return self.detect_head if self.nms or self.one2one_head is None else self.one2one_head

    def forward(self, images, targets=None):
        """
        images (B, 3, H, W) in 0..1, H and W multiples of 32, or clips (B, F, 3, H, W), whose last frame is detected in
        -> maps, losses.

        maps: three raw tensors (B, 64 + K, H / s, W / s), s = 8, 16, 32; 4 distances (left, top, right, bottom) x 16
        bins, then class logits. losses: {} without targets, else {part: (weighted sums by name, normalizer)} for the
        parts one2many and, where that head exists, one2one; see loss.detection_loss and loss.total_loss.
        """
        H, W = images.shape[-2:]
        assert H % 32 == 0 and W % 32 == 0, f'image sides must be multiples of 32, got {H}x{W}'
        features = self.forward_features(images)
        if targets is None:
            return self.run(self.inference_head(), *features), {}
        maps = self.run(self.detect_head, *features)
        with autocast_off(images):
            losses = dict(one2many=detection_loss(maps, targets))
        if self.one2one_head is not None:
            # it learns from the same features without shaping them, and one point alone is responsible for each object
            single = self.run(self.one2one_head, *(f.detach() for f in features))
            with autocast_off(images):
                losses['one2one'] = detection_loss(single, targets, topk=1)
        return maps, losses

    def decode(self, maps):
        """Raw maps -> boxes (B, A, 4) xyxy in input pixels, scores (B, A, K) probabilities, in float32."""
        box_logits, logits = flatten_maps(maps)
        return decode_boxes(box_logits, *make_anchor_points(maps)), logits.sigmoid()

    def postprocess(self, maps, conf=0.25, iou=0.7, max_det=300, multi_label=False):
        """
        Raw maps -> a list of (n, 6) tensors: x1, y1, x2, y2 in input pixels, score, class, by falling score; at most
        max_det of score above conf. multi_label: a point may name several classes, as in evaluation.
        """
        boxes, scores = self.decode(maps)
        return [select_detections(b, s, conf, iou, max_det, multi_label, self.nms)
                for b, s in zip(boxes, scores, strict=True)]

    @torch.no_grad()
    def detect(self, images, conf=0.25, iou=0.7, max_det=300, multi_label=False):
        """images (B, 3, H, W) in 0..1 -> detections as of postprocess. The training mode is kept."""
        modes = {module: module.training for module in self.modules()}                # a frozen part may differ
        self.eval()
        try:
            return self.postprocess(self(images)[0], conf, iou, max_det, multi_label)
        finally:
            for module, training in modes.items():
                module.training = training

    def fuse(self):
        """Inference form, in place: BatchNorm folded into convolutions, the blocks' weight products computed once."""
        self.eval()
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.fuse()
        for block in self.blocks().values():
            block.fuse()
        return self.requires_grad_(False)

    # --- what training asks for -------------------------------------------------------------------------------------

    def param_groups(self, lr, weight_decay, factors=None):
        """
        Optimizer groups by part (backbone, neck, block, head), each twice: what decays, and what must not (biases,
        norms, and the gate, which decay would pull shut). factors: dict part -> learning-rate factor.
        """
        part_of = (('backbone.', 'backbone'), ('block', 'block'), ('detect_head.', 'head'), ('one2one_head.', 'head'),
                   ('', 'neck'))
        return make_param_groups(self, part_of, lr, weight_decay, factors)

    def loss_parameters(self):
        """{part of the losses: the parameters it trains}: their gradients are divided by that part's normalizer."""
        parts = dict(one2many=[], one2one=[])
        for name, p in self.named_parameters():
            parts['one2one' if name.startswith('one2one') else 'one2many'].append(p)
        return {part: params for part, params in parts.items() if params}

    # --- weights ----------------------------------------------------------------------------------------------------

    def checkpoint(self, **more):
        """What from_pretrained needs (weights in full precision), and whatever else is passed, as one dict."""
        return dict(arch=self.arch, model=self.state_dict(), model_config=asdict(self.cfg), names=self.names,
                    imgsz=self.imgsz, **more)

    def save(self, path, **more):
        if any(isinstance(module, Conv) and isinstance(module.bn, nn.Identity) for module in self.modules()):
            raise InputError('a fused model cannot be saved: load it with fuse=False, save, then fuse')
        torch.save(self.checkpoint(**more), path)

    @classmethod
    def from_pretrained(cls, path, verbose=True, **overrides):
        """
        A model with the weights of `path`: a checkpoint of ours (its EMA weights, where it has them) or a YOLOv8 .pt
        file, which is read without Ultralytics and without running any code that it may carry. Overrides are
        HSVDETConfig's fields. Parts that the file cannot know start fresh and are named: attention blocks, also those
        that had another letter, a one-to-one head, the class branch when the number of classes differs, and, after
        another architecture, all but the backbone. Anything else that fails to match raises InputError.
        """
        saved = read_weights(path)
        ours, weights = saved['arch'] == 'hsvdet', saved['weights']
        known = saved['config'] if ours else dict(scale=saved['config']['scale'], num_classes=len(saved['names']))
        cfg = build(HSVDETConfig, {**known, **overrides}, among=overrides)
        before = build(HSVDETConfig, known)
        for level, old, new in zip((3, 4, 5), before.attn, cfg.attn, strict=True):
            lost = ()
            if old != new and not {old, new} <= set('SFD'):                # S, F and D have the same weights, no others
                lost = f'block{level}.'
            elif cfg.gate != before.gate and cfg.gate != 'learned':
                lost = f'block{level}.gate'                                    # it stands where the new setting puts it
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
        model = cls(cfg)
        model.imgsz = saved['imgsz']
        if cfg.num_classes == len(saved['names']):
            model.names = list(saved['names'])
        optional, other_classes = ('block', 'one2one_head'), cfg.num_classes != known['num_classes']
        fill(model, weights, path, verbose=verbose,
             may_be_fresh=lambda name: (name.startswith(optional) and name not in weights
                                        or other_classes and '_head.cls' in name
                                        or not ours and not name.startswith('backbone.')),
             may_be_left=lambda name: name.startswith(optional) or not ours and not name.startswith('backbone.'))
        return model


def make_param_groups(model, part_of, lr, weight_decay, factors=None):
    """Optimizer groups of the trainable parameters; part_of: pairs of a name's beginning and its part, first match."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            part, decays = next(part for prefix, part in part_of if name.startswith(prefix)), p.ndim > 1
            key = f'{part}.{"decay" if decays else "no_decay"}'
            group = dict(params=[], part=part, name=key, lr=lr * (factors or {}).get(part, 1.0),
                         weight_decay=weight_decay if decays else 0.0)
            groups.setdefault(key, group)['params'].append(p)
    return list(groups.values())


# --- python model.py ------------------------------------------------------------------------------------------------

def layer_table(model, H, W):
    """
    Rows (index, name, module, output shapes, parameters, FLOPs) of every layer in running order, without computing
    anything (meta tensors). FLOPs are two per multiply-add of convolutions and matrix products, nothing else; of the
    inference form.
    """
    from torch.utils.flop_counter import FlopCounterMode
    model = model.to('meta').eval()
    layers = [(f'backbone.{name}', m) for name, m in model.backbone.named_children()]
    layers += [(name, m) for name, m in model.named_children() if name != 'backbone']
    params = {name: sum(p.numel() for p in m.parameters()) for name, m in layers}
    for block in model.blocks().values():
        block.fuse()
    rows = []

    def record(module, inputs, output, name):
        maps = output if isinstance(output, (list, tuple)) else [output]
        rows.append([name, module, [tuple(t.shape[1:]) for t in maps if isinstance(t, torch.Tensor)]])

    for name, m in layers:
        m.register_forward_hook(lambda module, inputs, output, name=name: record(module, inputs, output, name))
    with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
        model(torch.empty(1, 3, H, W, device='meta'))
    flops = counter.get_flop_counts()
    root = type(model).__name__
    return [(i, name.removeprefix('backbone.'), m, shapes, params[name], sum(flops.get(f'{root}.{name}', {}).values()))
            for i, (name, m, shapes) in enumerate(rows)]


if __name__ == '__main__':
    scale = 'l'
    imgsz: int | tuple = (1088, 1920)                                                 # int, or (H, W)
    config = configure(globals(), HSVDETConfig)
    H, W = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    if H % 32 or W % 32:
        raise InputError(f'--imgsz={imgsz}: sides must be multiples of 32; 1080 rows are padded to 1088')
    cfg = build(HSVDETConfig, config)
    with torch.device('meta'):
        table = layer_table(HSVDET(cfg), H, W)
    print(f'HSV-DET-{scale}, attn {cfg.attn}, {cfg.num_classes} classes, image {H}x{W} (rows x columns)\n')
    print(f'{"#":>3}  {"name":<13}{"module":<24}{"output":<16}{"parameters":>12}{"GFLOPs":>10}')
    for i, name, m, shapes, p, f in table:
        shape = 'x'.join(map(str, shapes[0])) if shapes else ''
        print(f'{i:>3}  {name:<13}{type(m).__name__:<24}{shape:<16}{p:>12,}{f / 1e9:>10.2f}')
    parameters, flops = sum(row[4] for row in table), sum(row[5] for row in table)
    print(f'{"":>3}  {"total":<13}{"":<24}{"":<16}{parameters:>12,}{flops / 1e9:>10.2f}')

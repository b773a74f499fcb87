"""
The network: YOLOv8, with a gated sparse global attention block at P5 and P4. Small to large; the last class is the model.

    python model.py                                    the layer table, scale l at 1088x1920
    python model.py --scale=n --imgsz=640 --attn=---   any other

`HSVDET(HSVDETConfig())(images, targets)` returns raw maps and losses; `detect(images)` is what `generate` is to a
language model. Input sides must divide by 32 (1,080 rows do not: layer 16 would join 136 rows with 135).

With attn='---' this is YOLOv8 layer for layer, and `from_pretrained` reads its published checkpoints. What YOLOv8 is we
know from papers, tables and the arrays under tests/reference, to which tests/test_model.py holds this file equal.

Papers: cross-stage partial networks, Wang et al. 2019 (1911.11929); SPP, He et al. 2014 (1406.4729); PAN, Liu et al.
2018 (1803.01534); anchor-free points, FCOS, Tian et al. 2019 (1904.01355); distribution focal loss, Li et al. 2020
(2006.04388); one-to-one head, YOLOv10, Wang et al. 2024 (2405.14458). The block has its own file.
"""
import collections
import contextlib
import copy
import math
import pickle
import types
import zipfile
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import InputError
from loss import decode_boxes, detection_loss, flatten_maps, make_anchor_points
from sparse_attention import SparseGlobalBlockGated

torch.backends.cudnn.allow_tf32 = False                            # on a GPU float32 means float32, also in convolutions

SCALES = {  # depth, width, largest channel count before width
    'n': (0.33, 0.25, 1024),
    's': (0.33, 0.50, 1024),
    'm': (0.67, 0.75, 768),
    'l': (1.00, 1.00, 512),
    'x': (1.00, 1.25, 512),
}


@dataclass
class HSVDETConfig:
    scale: str = 'n'             # n s m l x
    num_classes: int = 80
    attn: str = '-SS'            # P3 P4 P5: '-' none, 'S' sparse, 'F' full, 'D' the block's dense path alone (a control)
    k: int | float = 512         # tokens that attend: a count, a fraction of all below 1, 0 for all
    select: str = 'l2sq'         # l2sq l2 random learned
    gate: str = 'learned'        # learned fixed none
    heads: int = 1               # attention heads
    pos: bool = False            # positional code for q and k
    one2one: bool = False        # a second head that needs no NMS

    def __post_init__(self):
        for ok, sentence in (
                (self.scale in SCALES, f'scale must be one of n s m l x, got {self.scale!r}'),
                (type(self.num_classes) is int and self.num_classes >= 1, f'num_classes must be at least 1, got {self.num_classes!r}'),
                (len(self.attn) == 3 and set(self.attn) <= set('-SFD'), f'attn has one of - S F D for each of P3 P4 P5, got {self.attn!r}'),
                (type(self.k) is int and self.k >= 0 or 0 < self.k < 1, f'k must be a count, a fraction below 1, or 0 for all, got {self.k!r}'),
                (self.select in ('l2sq', 'l2', 'random', 'learned'), f'select must be l2sq, l2, random or learned, got {self.select!r}'),
                (self.gate in ('learned', 'fixed', 'none'), f'gate must be learned, fixed or none, got {self.gate!r}'),
                (self.heads in (1, 2, 4, 8, 16), f'heads must be 1, 2, 4, 8 or 16, got {self.heads!r}')):
            if not ok:
                raise InputError(sentence)


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
    """Half of the channels pass by, half go through n bottlenecks; all n + 2 pieces are joined at the end."""

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
    """Three 5x5 max pools in a row see 5, 9 and 13 cells; joined with their input."""

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
    The head: for each of P3, P4, P5 a box branch (4 sides x 16 bins) and a class branch (K logits), decoupled and
    anchor-free. Three maps (B, c, H, W) -> three raw maps (B, 64 + K, H, W).
    """

    def __init__(self, channels, K):
        super().__init__()
        c_box, c_cls = max(16, channels[0] // 4, 64), max(channels[0], min(K, 100))
        self.box = nn.ModuleList(head_branch(c, c_box, 64) for c in channels)
        self.cls = nn.ModuleList(head_branch(c, c_cls, K) for c in channels)
        # 0..15: what a bin stands for. It never trains; a parameter because the published counts include these 16
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
    Exact greedy NMS. boxes (P, 4) xyxy, scores (P,), labels (P,) -> indices of the kept ones, at most max_det, by
    falling score; of equal scores the lower index comes first. A box goes when a kept box of its own class overlaps it
    by more than iou_threshold.

    Classes are compared. (Shifting every class's boxes by 7,680 px to tell them apart leaves float32 a grid of 1/16 px
    and overflows float16 from class 9 on.) The candidates are taken in blocks, best first: those that survive the
    kept boxes so far settle among themselves, on a matrix of one block, and the walk ends as soon as max_det are kept.
    Memory is bounded by (kept + block) x block, time by what is kept; no clock ends it early.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order].float(), labels[order]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = order.new_zeros(0)                                                         # positions in the sorted list
    block, first = 256, 0

    def suppresses(a, b):
        """(len(a), len(b)): does box a suppress box b? inter / union > t, written without a division."""
        inter = (torch.minimum(boxes[a, None, 2:], boxes[None, b, 2:]) - torch.maximum(boxes[a, None, :2], boxes[None, b, :2])).clamp_(min=0).prod(2)
        return (inter > iou_threshold * (area[a, None] + area[None, b] - inter)) & (labels[a, None] == labels[None, b])

    while first < len(order) and len(kept) < max_det:
        new = torch.arange(first, min(first + block, len(order)), device=boxes.device)
        if len(kept):
            new = new[~suppresses(kept, new).any(0)]
        # Greedy on a matrix: a candidate stays unless one that stays hits it. Start with "all stay" and repeat. After t
        # rounds the best t have their final answer, so this ends, and in practice within a few rounds.
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
    if multi_label:                                                                   # a point may name several classes
        point, label = (scores > conf).nonzero(as_tuple=True)
        score = scores[point, label]
    else:
        score, label = scores.max(1)
        point = (score > conf).nonzero()[:, 0]
        score, label = score[point], label[point]
    if len(point) > max_candidates:
        best = score.argsort(descending=True, stable=True)[:max_candidates]
        point, label, score = point[best], label[best], score[best]
    keep = nms(boxes[point], score, label, iou, max_det) if use_nms else score.argsort(descending=True, stable=True)[:max_det]
    return torch.cat((boxes[point[keep]], score[keep, None], label[keep, None].to(boxes.dtype)), 1)


BACKBONE = ('stem', 'down2', 'stage2', 'down3', 'stage3', 'down4', 'stage4', 'down5', 'stage5', 'sppf')


# --- the model -------------------------------------------------------------------------------------------------------

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
    to recompute activations in the backward pass (less memory, about a third more time).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.names = [f'class{i}' for i in range(cfg.num_classes)]
        self.imgsz = None
        self.checkpointing = False
        depth, width, largest = SCALES[cfg.scale]
        c1, c2, c3, c4, c5 = (math.ceil(min(c, largest) * width / 8) * 8 for c in (64, 128, 256, 512, 1024))

        def n(repeats):
            return max(1, round(repeats * depth))

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
        self.block5 = self.make_block(cfg.attn[2], c5)

        self.up4 = nn.Upsample(scale_factor=2)
        self.cat4 = Concat()
        self.fpn4 = C2f(c5 + c4, c4, n(3), False)
        self.block4 = self.make_block(cfg.attn[1], c4)
        self.up3 = nn.Upsample(scale_factor=2)
        self.cat3 = Concat()
        self.fpn3 = C2f(c4 + c3, c3, n(3), False)
        self.block3 = self.make_block(cfg.attn[0], c3)
        self.pan_down4 = Conv(c3, c3, 3, 2)
        self.pan_cat4 = Concat()
        self.pan4 = C2f(c3 + c4, c4, n(3), False)
        self.pan_down5 = Conv(c4, c4, 3, 2)
        self.pan_cat5 = Concat()
        self.pan5 = C2f(c4 + c5, c5, n(3), False)

        self.detect_head = Detect((c3, c4, c5), cfg.num_classes)
        self.one2one_head = copy.deepcopy(self.detect_head) if cfg.one2one else None

    def make_block(self, letter, c):
        if letter == '-':
            return None
        k, select = {'S': (self.cfg.k, self.cfg.select), 'F': (0, 'l2sq'), 'D': (0, 'none')}[letter]
        return SparseGlobalBlockGated(c, k, select, self.cfg.heads, self.cfg.pos, self.cfg.gate)

    def blocks(self):
        """The sparse blocks there are, by level: dict(p4=..., p5=...)."""
        return {f'p{i}': block for i in (3, 4, 5) if (block := getattr(self, f'block{i}')) is not None}

    def run_layer(self, layer, *x):
        """layer(*x), its inner activations forgotten and recomputed in the backward pass when `checkpointing` is set."""
        if not (self.checkpointing and self.training):
            return layer(*x)
        return checkpoint(layer, *x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), freeze_bn_stats(layer)))

    def forward_features(self, x):
        """images (B, 3, H, W) in 0..1 -> the three maps that the head sees, strides 8, 16, 32."""
        x = self.run_layer(self.stem, x)
        p2 = self.run_layer(self.stage2, self.run_layer(self.down2, x))
        p3 = self.run_layer(self.stage3, self.run_layer(self.down3, p2))
        p4 = self.run_layer(self.stage4, self.run_layer(self.down4, p3))
        p5 = self.run_layer(self.stage5, self.run_layer(self.down5, p4))
        p5 = self.run_layer(self.sppf, p5)
        if self.block5 is not None:
            p5 = self.block5(p5)
        # top-down: what is far up and knows what things are tells those below, which know where they are
        n4 = self.run_layer(self.fpn4, self.cat4(self.up4(p5), p4))
        if self.block4 is not None:
            n4 = self.block4(n4)
        n3 = self.run_layer(self.fpn3, self.cat3(self.up3(n4), p3))
        if self.block3 is not None:
            n3 = self.block3(n3)
        # bottom-up: and back again
        m4 = self.run_layer(self.pan4, self.pan_cat4(self.run_layer(self.pan_down4, n3), n4))
        m5 = self.run_layer(self.pan5, self.pan_cat5(self.run_layer(self.pan_down5, m4), p5))
        return n3, m4, m5

    def forward(self, images, targets=None, reduce=True, one2one=False):
        """
        images (B, 3, H, W) in 0..1, H and W multiples of 32 -> maps, losses.

        maps: three raw tensors (B, 64 + K, H / s, W / s), s = 8, 16, 32; 4 sides (left, top, right, bottom) x 16 bins,
        then class logits; those of the one-to-one head if `one2one`. losses: {} without targets, else what
        loss.detection_loss returns, plus the same under one2one_* names where that head exists.
        """
        H, W = images.shape[2:]
        assert H % 32 == 0 and W % 32 == 0, f'image sides must be multiples of 32, got {H}x{W}'
        features = self.forward_features(images)
        if targets is None:
            head = self.one2one_head if one2one else self.detect_head
            return self.run_layer(head, *features), {}
        maps = self.run_layer(self.detect_head, *features)
        with torch.autocast(images.device.type, enabled=False):
            losses = detection_loss(maps, targets, reduce=reduce)
        if self.one2one_head is not None:
            # it learns from the same features without shaping them, and one point alone answers for each object
            single = self.run_layer(self.one2one_head, *(f.detach() for f in features))
            with torch.autocast(images.device.type, enabled=False):
                more = detection_loss(single, targets, topk=1, reduce=reduce)
            losses.update({f'one2one_{name}': value for name, value in more.items()})
            maps = single if one2one else maps
        return maps, losses

    def decode(self, maps):
        """Raw maps -> boxes (B, A, 4) xyxy in input pixels, scores (B, A, K) probabilities, in float32."""
        sides, logits = flatten_maps(maps)
        return decode_boxes(sides, *make_anchor_points(maps)), logits.sigmoid()

    @torch.no_grad()
    def detect(self, images, conf=0.25, iou=0.7, max_det=300, multi_label=False, nms=True):
        """
        images (B, 3, H, W) in 0..1 -> a list of (n, 6) tensors: x1, y1, x2, y2 in input pixels, score, class.

        nms=False takes the one-to-one head where there is one, and its best scores as they are. Evaluation asks for
        conf=0.001 and multi_label=True. The model's training mode is left as it was found.
        """
        was_training = self.training
        self.eval()
        try:
            maps, _ = self(images, one2one=not nms and self.one2one_head is not None)
        finally:
            self.train(was_training)
        boxes, scores = self.decode(maps)
        return [select_detections(b, s, conf, iou, max_det, multi_label, nms) for b, s in zip(boxes, scores, strict=True)]

    def fuse(self):
        """Inference form, in place: BatchNorm folded into convolutions, the blocks' weight products computed once."""
        self.eval()
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.fuse()
        for block in self.blocks().values():
            if block.heads == 1 and block.merged is None:
                block.merge_projections()
        return self.requires_grad_(False)

    def param_groups(self, lr, weight_decay, factors=None):
        """
        Optimizer groups by part (backbone, neck, block, head), each twice: what decays, and what must not (biases, norms,
        and the gate, which decay would pull shut). factors: dict part -> learning-rate factor. Each group has a 'name'.
        """
        part_of = dict.fromkeys(BACKBONE, 'backbone') | dict.fromkeys(('block3', 'block4', 'block5'), 'block')
        part_of |= dict.fromkeys(('detect_head', 'one2one_head'), 'head')
        groups = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                part = part_of.get(name.split('.')[0], 'neck')
                decays = p.ndim > 1
                group = groups.setdefault(f'{part}.{"decay" if decays else "no_decay"}', dict(
                    params=[], part=part, lr=lr * (factors or {}).get(part, 1.0), weight_decay=weight_decay if decays else 0.0))
                group['params'].append(p)
        return [dict(group, name=name) for name, group in groups.items()]

    # --- weights -------------------------------------------------------------------------------------------------------

    def checkpoint(self, **more):
        """What from_pretrained needs (weights in full precision), and whatever else is passed, as one dict."""
        return dict(model=self.state_dict(), model_config=asdict(self.cfg), names=self.names, imgsz=self.imgsz, **more)

    def save(self, path, **more):
        torch.save(self.checkpoint(**more), path)

    @classmethod
    def from_pretrained(cls, path, verbose=True, **overrides):
        """
        A model with the weights of `path`: our own checkpoint (its EMA weights, where it has them) or a YOLOv8 .pt file,
        which is read without Ultralytics and without running any code that it may carry. Overrides are HSVDETConfig's
        fields. Parts that the file cannot know start fresh and are named: sparse blocks, a one-to-one head, and the
        class branch when the number of classes differs. Anything else that fails to match raises InputError.
        """
        saved = read_checkpoint(path)
        try:
            if 'model_config' in saved:
                config, weights, names = saved['model_config'], saved.get('ema') or saved['model'], saved['names']
            else:
                config, weights, names = yolov8_weights(saved, path)
            cfg = HSVDETConfig(**{**config, **overrides})
        except (KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(f'{path} is neither a checkpoint of ours nor a YOLOv8 detector ({type(e).__name__}: {e})') from None
        model = cls(cfg)
        model.imgsz = saved.get('imgsz')
        if cfg.num_classes == len(names):
            model.names = list(names)
        own = model.state_dict()
        other_classes = cfg.num_classes != config['num_classes']
        fresh = []
        for name, tensor in own.items():
            given = weights.get(name)
            if given is not None and given.shape == tensor.shape:
                own[name] = given.to(tensor.dtype)
            elif name.startswith(('block', 'one2one_head')) and given is None or other_classes and '_head.cls' in name:
                fresh.append(name)
            else:
                had = 'is missing' if given is None else f'is {tuple(given.shape)}, not {tuple(tensor.shape)}'
                raise InputError(f'{path} does not fit this network (scale {cfg.scale}, attn {cfg.attn}, {cfg.num_classes} classes): {name} {had}')
        left = [name for name in weights if name not in own]
        if any(not name.startswith(('block', 'one2one_head')) for name in left):
            raise InputError(f'{path} holds tensors that this network (scale {cfg.scale}) has no place for, such as {left[0]}')
        model.load_state_dict(own)
        if verbose:
            parts = collections.Counter('.'.join(name.split('.')[:2 if '_head' in name else 1]) for name in fresh)
            print(f'{path}: {len(own) - len(fresh)} tensors matched'
                  + ''.join(f'; {part} starts fresh ({count})' for part, count in parts.items())
                  + (f'; {len(left)} left unused (the file has blocks that attn={cfg.attn} leaves out)' if left else ''))
        return model


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


# --- foreign checkpoints ---------------------------------------------------------------------------------------------

class StubClass:
    """Stands in for every class of a foreign pickle: keeps what it is given and does nothing with it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key, value):                                                # subclasses of dict and list are
        pass                                                                          # filled while they load

    def append(self, value):
        pass

    def extend(self, values):
        pass


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors and plain containers; the classes a YOLO file is known to name become Inert,
    and any other name, which is where code would come from, is refused. (The storages, torch.HalfStorage and such, are
    markers of a dtype that torch.load resolves itself.)"""

    def find_class(self, module, name):
        allowed = {                                                                   # functions wrapped: a pickle may set attributes
            ('collections', 'OrderedDict'): collections.OrderedDict,                  # of what it is given, and shall not of torch's own
            ('torch._utils', '_rebuild_tensor_v2'): lambda *a: torch._utils._rebuild_tensor_v2(*a),
            ('torch._utils', '_rebuild_parameter'): lambda *a: torch._utils._rebuild_parameter(*a),
            ('torch', 'Size'): torch.Size,
            ('builtins', 'set'): set, ('__builtin__', 'set'): set,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split('.')[0] in ('ultralytics', 'models', 'utils') or module.startswith('torch.nn.modules.'):
            return type(name, (StubClass,), {})
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def read_checkpoint(path):
    """The content of a .pt file: our own dict, or a foreign one with inert objects in place of its classes."""
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()                                                      # torch.load does not check the CRCs
            program = any(name.endswith('constants.pkl') for name in z.namelist())
        if broken:
            raise zipfile.BadZipFile(broken)
        if program:                                                                   # torch.load would hand it to torch.jit, and run it
            raise InputError(f'{path} was refused: it is a TorchScript program, which is code; give a checkpoint of weights')
    except FileNotFoundError:
        raise InputError(f'checkpoint {path} not found: train one with python train.py config/shapes.py, or give --weights=') from None
    except IsADirectoryError:
        raise InputError(f'{path} is a folder: give the checkpoint in it, such as {path}/best.pt') from None
    except (zipfile.BadZipFile, OSError, EOFError) as e:
        raise InputError(f'{path} is not a complete checkpoint ({e}): the download or the write broke off, fetch it again') from None
    careful = types.SimpleNamespace(Unpickler=RestrictedUnpickler, load=None, __name__='pickle')
    try:
        try:
            saved = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:                                                # a genuine foreign file, or a hostile one
            saved = torch.load(path, map_location='cpu', weights_only=False, pickle_module=careful)
    except Exception as e:                                                            # there is no end to what a wrong file can raise
        why = ' '.join(str(e).split())[:200]
        raise InputError(f'{path} was refused: it is no checkpoint that can be read without running code ({why})') from None
    if not isinstance(saved, dict):
        raise InputError(f'{path} was refused: it holds a {type(saved).__name__}, not a checkpoint')
    return saved


def yolov8_weights(saved, path):
    """A YOLOv8 file's content -> our config dict, our state dict, class names."""
    root = saved.get('ema') or saved.get('model')
    tensors = {}

    def walk(module, prefix):
        for kind in ('_parameters', '_buffers'):
            tensors.update({prefix + name: t.detach().float() for name, t in getattr(module, kind, {}).items() if isinstance(t, torch.Tensor)})
        for name, child in getattr(module, '_modules', {}).items():
            walk(child, f'{prefix}{name}.')

    walk(root, '')
    width = {16: 'n', 32: 's', 48: 'm', 64: 'l', 80: 'x'}
    stem, logits = tensors.get('model.0.conv.weight'), tensors.get('model.22.cv3.0.2.weight')
    if stem is None or logits is None or stem.shape[0] not in width or stem.shape[2] != 3 or 'model.22.dfl.conv.weight' not in tensors:
        raise InputError(f'{path} is not a YOLOv8 detector (n s m l x): the layers do not have its names and shapes')
    rename = dict(zip((f'model.{i}.' for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 18, 19, 21)),
                      ('stem', 'down2', 'stage2', 'down3', 'stage3', 'down4', 'stage4', 'down5', 'stage5', 'sppf',
                       'fpn4', 'fpn3', 'pan_down4', 'pan4', 'pan_down5', 'pan5'), strict=True))
    weights = {}
    for name, t in tensors.items():
        if name == 'model.22.dfl.conv.weight':
            name, t = 'detect_head.bins', t.flatten()
        elif name.startswith('model.22.'):
            name = name.replace('model.22.cv2.', 'detect_head.box.').replace('model.22.cv3.', 'detect_head.cls.')
        else:
            head = next((old for old in rename if name.startswith(old)), None)
            if head is None:
                raise InputError(f'{path} is not a YOLOv8 detector: it has a tensor {name}')
            rest = name[len(head):]
            if rest.startswith('m.'):                                                 # C2f's bottlenecks
                rest = 'blocks.' + rest[2:].replace('cv1.', 'conv1.').replace('cv2.', 'conv2.')
            else:
                rest = rest.replace('cv1.', 'conv_in.').replace('cv2.', 'conv_out.')
            name = f'{rename[head]}.{rest}'
        weights[name] = t
    K = logits.shape[0]
    names = getattr(root, 'names', None) or {i: f'class{i}' for i in range(K)}
    names = [str(names[i]) for i in range(K)] if isinstance(names, dict) else [str(n) for n in names]
    return dict(scale=width[stem.shape[0]], num_classes=K, attn='---'), weights, names


# --- python model.py ---------------------------------------------------------------------------------------------------

def layer_table(cfg, H, W):
    """
    Rows (index, name, module, output shapes, parameters, FLOPs) of every layer in running order, without computing
    anything (meta tensors). FLOPs are two per multiply-add of convolutions and matrix products, nothing else.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device('meta'):
        model = HSVDET(cfg).eval()
        image = torch.empty(1, 3, H, W)
    params = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    for block in model.blocks().values():                                             # FLOPs are those of the inference form
        if block.heads == 1:
            block.merge_projections()
    rows = []

    def hook(module, inputs, output, name):
        shapes = [tuple(t.shape[1:]) for t in (output if isinstance(output, list) else [output])]
        rows.append([name, module, shapes])

    for name, m in model.named_children():
        m.register_forward_hook(lambda module, inputs, output, name=name: hook(module, inputs, output, name))
    with FlopCounterMode(display=False, depth=2) as counter, torch.no_grad():
        model(image)
    flops = counter.get_flop_counts()
    return [(i, name, m, shapes, params[name], sum(flops.get(f'HSVDET.{name}', {}).values())) for i, (name, m, shapes) in enumerate(rows)]


if __name__ == '__main__':
    scale, attn, num_classes, k = 'l', '-SS', 80, 512
    imgsz: int | tuple = (1088, 1920)  # int, or (H, W)
    from configurator import configure
    configure(globals())
    H, W = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    if H % 32 or W % 32:
        raise InputError(f'--imgsz={imgsz}: sides must be multiples of 32; 1080 rows are padded to 1088')
    table = layer_table(HSVDETConfig(scale=scale, attn=attn, num_classes=num_classes, k=k), H, W)
    print(f'HSV-DET-{scale}, attn {attn}, {num_classes} classes, image {H}x{W} (rows x columns)\n')
    print(f'{"#":>3}  {"name":<12}{"module":<24}{"output":<16}{"parameters":>12}{"GFLOPs":>10}')
    for i, name, m, shapes, p, f in table:
        print(f'{i:>3}  {name:<12}{type(m).__name__:<24}{"x".join(map(str, shapes[0])):<16}{p:>12,}{f / 1e9:>10.2f}')
    print(f'{"":>3}  {"total":<12}{"":<24}{"":<16}{sum(r[4] for r in table):>12,}{sum(r[5] for r in table) / 1e9:>10.2f}')

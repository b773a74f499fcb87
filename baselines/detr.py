"""
RT-DETR, a baseline that predicts a set: each of a fixed number of queries ends as one box or as nothing. No NMS.

    images -> Backbone -> hybrid encoder -> query selection -> decoder -> boxes (B, Q, 4), scores (B, Q, K)

    hybrid encoder    full attention among the tokens of P5 only (AIFI), then convolutions fuse the three levels (CCFM)
    query selection   every token proposes a box; the Q with the highest class score become the decoder's queries
    decoder           queries attend to each other, then each samples the maps at a few points around its box; every
                      layer refines the boxes of the layer before
    training          Hungarian matching pairs each object with exactly one query, separately for each layer; the rest
                      learns "background". Denoising: extra queries start at disturbed true boxes and labels, need no
                      matching, and teach the decoder to refine from the first step on

Why no NMS: a grid point decides without knowing its neighbour's decision, so two of them report one object. Queries see
each other, and a loss that pays one query per object teaches them to agree on who reports it.

What differs from the published model: our backbone instead of a ResNet; padding among the denoising queries has no
loss; encoder_attn='S' puts the sparse global block in AIFI's place. What is left out: distillation, masks. Modules are
called as in transformers' RTDetr. Boxes are cx, cy, w, h in 0..1 inside the decoder and xyxy input pixels outside of
it. Shapes: N tokens of the three levels, Q queries that are matched and D that denoise (L = D + Q), M padded objects, K
classes, nh heads of hs channels.

Papers: DETR, Carion et al. 2020 (2005.12872); deformable attention, Zhu et al. 2020 (2010.04159); denoising and looking
forward twice, DINO, Zhang et al. 2022 (2203.03605); RT-DETR, Zhao et al. 2023 (2304.08069); RepVGG, Ding et al. 2021
(2101.03697); varifocal loss, Zhang et al. 2020 (2008.13367); matchability-aware loss, DEIM, Huang et al. 2024
(2412.04234).
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from baselines.dinov2 import VARIANTS, DINOv2
from checkpoint import fill, read_weights
from configurator import InputError, build
from loss import bbox_iou, make_anchor_points
from model import HSVDET, SCALES, Backbone, Conv, make_param_groups
from sparse_attention import SparseGlobalBlockGated, autocast_off, sincos_2d

STRIDES = (8, 16, 32)
CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1, 5, 2                                        # of the losses
CLASS_COST, L1_COST, GIOU_COST = 2, 5, 2                                              # of the matching
EPS = 1e-5                                              # logits of box coordinates stop at about -11.5 and 11.5


@dataclass
class DETRConfig:
    scale: str = 'n'                                                                  # of the backbone: n s m l x
    num_classes: int = 80
    hidden: int = 256                                                                 # channels of encoder and decoder
    detr_heads: int = 8                                                               # attention heads of both
    ffn: int = 1024                                                        # hidden channels of the feed-forward layers
    decoder_layers: int = 6                                                           # 3 suffice for a small backbone
    queries: int = 300                               # the most objects it can report; never more than there are tokens
    points: int = 4                                                                # sampling points per head and level
    denoising: int = 100                                  # denoising queries per image of each kind, in groups; 0: off
    label_noise: float = 0.25                                                  # share of their labels that are redrawn
    box_noise: float = 1.0                                                      # shift of their corners, in half sides
    class_loss: str = 'vfl'                                                           # vfl mal
    encoder_attn: str = 'F'                                              # attention at P5: 'F' full (AIFI), 'S' sparse
    k: int | float = 512                    # of 'S': tokens that attend: a count, a fraction of all below 1, 0 for all
    eval_layers: int = 0                                    # decoder layers that run at inference (early exit); 0: all
    backbone: str = ''                                    # '' is model.py's at `scale`; or dinov2_s, dinov2_b, ..._reg
    backbone_weights: str = ''                                    # a DINOv2 file for it; '' starts from random weights
    position_resize: str = ''                     # of its position embedding: see DINOv2; '' as transformers resizes it
    lora_rank: int = 4                                                    # of the adapters in a frozen DINOv2; 0: none
    lora_layers: str | tuple = 'all'                                      # its blocks that get them, counted from 1
    lora_matrices: str = 'qkv'                                            # among q k v proj fc1 fc2: qkv,fc1,fc2
    look_forward_twice: bool = True                          # the box loss of a layer also reaches the layer before it

    def __post_init__(self):
        given = vars(self)
        for name, least in dict(num_classes=1, hidden=1, detr_heads=1, ffn=1, decoder_layers=1, queries=1, points=1,
                                denoising=0, eval_layers=0, lora_rank=0).items():
            if type(given[name]) is not int or given[name] < least:
                raise InputError(f'{name} must be an int of at least {least}, got {given[name]!r}')
        for name, ok, wanted in (
                ('scale', self.scale in SCALES, 'one of n s m l x'),
                ('backbone', self.backbone in ('', *VARIANTS), f"'' or one of {' '.join(VARIANTS)}"),
                ('backbone_weights', self.backbone or not self.backbone_weights, "'' where backbone is ''"),
                ('hidden', self.hidden % math.lcm(4, self.detr_heads) == 0,
                 f'a multiple of 4 and of detr_heads={self.detr_heads}'),
                ('label_noise', 0 <= self.label_noise <= 1, 'in 0..1'),
                ('box_noise', self.box_noise >= 0, 'at least 0'),
                ('class_loss', self.class_loss in ('vfl', 'mal'), 'vfl or mal'),
                ('encoder_attn', self.encoder_attn in ('F', 'S'), 'F or S'),
                ('k', type(self.k) is int and self.k >= 0 or 0 < self.k < 1, 'a count, a fraction below 1, or 0: all'),
                ('eval_layers', self.eval_layers <= self.decoder_layers,
                 f'at most decoder_layers={self.decoder_layers}')):
            if not ok:
                raise InputError(f'{name} must be {wanted}, got {given[name]!r}')


def to_pixels(boxes, H, W):
    """(..., 4) cx, cy, w, h in 0..1 -> (..., 4) xyxy in pixels of an H x W image."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack(((cx - w / 2) * W, (cy - h / 2) * H, (cx + w / 2) * W, (cy + h / 2) * H), -1)


def from_pixels(boxes, H, W):
    """The inverse of to_pixels."""
    x1, y1, x2, y2 = boxes.float().unbind(-1)
    return torch.stack(((x1 + x2) / 2 / W, (y1 + y2) / 2 / H, (x2 - x1) / W, (y2 - y1) / H), -1)


# --- encoder ---------------------------------------------------------------------------------------------------------

class ConvNorm(Conv):
    """model.Conv with the BatchNorm settings of RT-DETR (PyTorch's own), and an activation only where wanted."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, act=True):
        super().__init__(c_in, c_out, kernel, stride)
        self.bn = nn.BatchNorm2d(c_out)
        self.act = nn.SiLU() if act else nn.Identity()


class RepVGG(nn.Module):
    """A 3x3 and a 1x1 convolution side by side in training; both are linear, so `fuse` makes them one 3x3."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = ConvNorm(c, c, 3, act=False)
        self.conv2 = ConvNorm(c, c, 1, act=False)

    def forward(self, x):
        y = self.conv1(x)
        return F.silu(y if self.conv2 is None else y + self.conv2(x))

    def fuse(self):
        """Moves the 1x1, as the centre of a 3x3, into the 3x3. Their BatchNorms must have been folded before."""
        if self.conv2 is not None:
            self.conv1.conv.weight.data += F.pad(self.conv2.conv.weight.data, (1, 1, 1, 1))
            self.conv1.conv.bias.data += self.conv2.conv.bias.data
            self.conv2 = None


class CSPRep(nn.Module):
    """Fuses two levels: (B, 2C, H, W) -> (B, C, H, W), three RepVGG layers on one of two branches, then their sum."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = ConvNorm(2 * c, c)
        self.conv2 = ConvNorm(2 * c, c)
        self.bottlenecks = nn.Sequential(*(RepVGG(c) for _ in range(3)))

    def forward(self, x):
        return self.bottlenecks(self.conv1(x)) + self.conv2(x)


class Attention(nn.Module):
    """Multi-head self-attention over x (B, L, C); positions, which broadcast to x, are added for q and k only."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c, c) for _ in range(4))
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, position, mask=None):
        """mask (L, L) bool: True where the row's token may attend to the column's."""
        placed = x + position
        q, k, v = self.q_proj(placed), self.k_proj(placed), self.v_proj(x)            # (B, L, C) each
        wide = torch.promote_types(q.dtype, torch.float32)
        with autocast_off(x):           # float32: a softmax over bf16 logits is coarse, and on a CPU twice as slow
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2).to(wide) for t in (q, k, v))  # (B, nh, L, hs)
            y = F.scaled_dot_product_attention(q, k, v, mask)                         # (B, nh, L, hs)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))                  # (B, L, C)


class AIFI(nn.Module):
    """
    Attention-based intra-scale feature interaction: one post-norm transformer layer, (B, C, H, W) -> the same.

    encoder_attn='S': the sparse global block attends instead, with as many heads, positions, its gate open and its norm
    on q and k. P5 of 640 px has 400 tokens, of which k=512 are all: for a sparse layer take k=100, or 0.25.
    """

    def __init__(self, cfg):
        super().__init__()
        c, nh, sparse = cfg.hidden, cfg.detr_heads, cfg.encoder_attn == 'S'
        self.self_attn = None if sparse else Attention(c, nh)
        self.block = SparseGlobalBlockGated(c, k=cfg.k, heads=nh, pos=True, gate='none') if sparse else None
        self.norm1 = nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, cfg.ffn), nn.Linear(cfg.ffn, c)
        self.norm2 = nn.LayerNorm(c)

    def forward(self, x):
        B, C, H, W = x.shape
        t = (x if self.block is None else self.block(x)).flatten(2).transpose(1, 2)   # (B, N, C)
        if self.block is None:                                                        # the block's residual is in it
            t = t + self.self_attn(t, sincos_2d(H, W, C, x.device).to(x.dtype))
        t = self.norm1(t)
        t = self.norm2(t + self.fc2(F.gelu(self.fc1(t))))
        return t.transpose(1, 2).reshape(B, C, H, W)


class HybridEncoder(nn.Module):
    """Maps at strides 8, 16, 32 with `channels` each -> the same with cfg.hidden channels, each informed by all."""

    def __init__(self, channels, cfg):
        super().__init__()
        c = cfg.hidden
        self.input_proj = nn.ModuleList(ConvNorm(c_in, c, act=False) for c_in in channels)
        self.aifi = AIFI(cfg)
        self.lateral_convs = nn.ModuleList(ConvNorm(c, c) for _ in range(2))
        self.fpn_blocks = nn.ModuleList(CSPRep(c) for _ in range(2))
        self.downsample_convs = nn.ModuleList(ConvNorm(c, c, 3, 2) for _ in range(2))
        self.pan_blocks = nn.ModuleList(CSPRep(c) for _ in range(2))

    def forward(self, features):
        p3, p4, p5 = (proj(f) for proj, f in zip(self.input_proj, features, strict=True))
        n5 = self.lateral_convs[0](self.aifi(p5))
        n4 = self.lateral_convs[1](self.fpn_blocks[0](torch.cat((F.interpolate(n5, scale_factor=2), p4), 1)))
        n3 = self.fpn_blocks[1](torch.cat((F.interpolate(n4, scale_factor=2), p3), 1))
        m4 = self.pan_blocks[0](torch.cat((self.downsample_convs[0](n3), n4), 1))
        m5 = self.pan_blocks[1](torch.cat((self.downsample_convs[1](m4), n5), 1))
        return n3, m4, m5


# --- decoder ---------------------------------------------------------------------------------------------------------

class MLP(nn.Module):
    """Linear layers of the given widths with a ReLU between."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DeformableAttention(nn.Module):
    """
    Each query reads the maps at `points` places per level and head, found relative to its own box, and takes their
    weighted mean: 12 samples a head instead of N products, so a query costs the same on any image size.
    """

    def __init__(self, c, heads, points):
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(c, heads * len(STRIDES) * points * 2)
        self.attention_weights = nn.Linear(c, heads * len(STRIDES) * points)
        self.value_proj, self.output_proj = nn.Linear(c, c), nn.Linear(c, c)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for parameter in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(parameter)
        # at first head h looks in direction 2 pi h / heads, 1/P, 2/P .. P/P of the way to the border of the box
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)                       # (nh, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        start = direction[:, None, None] * torch.arange(1, points + 1)[:, None]       # (nh, 1, P, 2)
        self.sampling_offsets.bias.data = start.expand(-1, len(STRIDES), -1, -1).flatten()

    def forward(self, x, reference, memory, shapes):
        """x (B, L, C), reference boxes (B, L, 4) float32, memory (B, N, C), shapes (H, W) per level -> (B, L, C)"""
        B, L, C = x.shape
        nh, P = self.heads, self.points
        value = self.value_proj(memory).transpose(1, 2).split([H * W for H, W in shapes], 2)  # (B, C, H*W) each
        offsets = self.sampling_offsets(x).float().view(B, L, nh, len(STRIDES), P, 2)
        weights = self.attention_weights(x).float().view(B, L, nh, -1).softmax(-1)    # over levels and points together
        with autocast_off(x):                                     # a coordinate in bf16 has 8 bits: 1/256 of the image
            centre, side = reference[:, :, None, None, None].split(2, -1)             # (B, L, 1, 1, 1, 2) each
            grid = 2 * (centre + offsets / P * side * 0.5) - 1                        # -1..1, as grid_sample has it
            grid = grid.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)                       # (3, B * nh, L, P, 2)
            samples = [F.grid_sample(v.float().reshape(B * nh, C // nh, H, W), at, align_corners=False)
                       for v, at, (H, W) in zip(value, grid.unbind(), shapes, strict=True)]  # (B * nh, hs, L, P) each
            weights = weights.transpose(1, 2).reshape(B * nh, 1, L, -1)               # (B * nh, 1, L, 3P)
            y = (torch.cat(samples, -1) * weights).sum(-1)                            # (B * nh, hs, L)
        return self.output_proj(y.view(B, C, L).transpose(1, 2).to(x.dtype))          # (B, L, C)


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the maps, then pass a feed-forward layer; post-norm."""

    def __init__(self, cfg):
        super().__init__()
        c = cfg.hidden
        self.self_attn = Attention(c, cfg.detr_heads)
        self.norm1 = nn.LayerNorm(c)
        self.encoder_attn = DeformableAttention(c, cfg.detr_heads, cfg.points)
        self.norm2 = nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, cfg.ffn), nn.Linear(cfg.ffn, c)
        self.norm3 = nn.LayerNorm(c)

    def forward(self, x, position, reference, memory, shapes, mask):
        x = self.norm1(x + self.self_attn(x, position, mask))
        x = self.norm2(x + self.encoder_attn(x + position, reference, memory, shapes))
        return self.norm3(x + self.fc2(F.relu(self.fc1(x))))                          # (B, L, C)


# --- denoising, matching, losses -------------------------------------------------------------------------------------

def denoising_queries(targets, size, cfg, Q):
    """
    Disturbed objects, D = 2 M groups of them: labels (B, D), K for padding, boxes (B, D, 4) cx, cy, w, h, and the mask
    (D + Q, D + Q) bool: may the row's query attend to the column's?

    A group is M positives, whose corners move by less than half a side and which must find their object again, then M
    negatives, which move by more and must say "background".
    """
    labels, device = targets['labels'], targets['labels'].device
    B, M = labels.shape
    groups = max(1, cfg.denoising // M)
    D = 2 * M * groups
    # 1) draw from PyTorch's global CPU generator; how many numbers depends on the shapes only
    redrawn, other = torch.rand(B, D) < cfg.label_noise, torch.randint(cfg.num_classes, (B, D))
    sign = torch.randint(2, (B, D, 4)) * 2 - 1
    negative = torch.arange(D)[:, None] // M % 2                                      # (D, 1)
    shift = (torch.rand(B, D, 4) + negative) * sign                                   # (B, D, 4), in half sides
    redrawn, other, shift = (t.to(device, non_blocking=True) for t in (redrawn, other, shift))
    # 2) the objects, 2 groups times one after the other, disturbed
    labels = labels.repeat(1, 2 * groups)                                             # (B, D)
    boxes = from_pixels(targets['boxes'], *size).repeat(1, 2 * groups, 1)             # (B, D, 4)
    half = boxes[..., 2:].repeat(1, 1, 2) / 2                                         # (B, D, 4) w, h, w, h
    corners = (to_pixels(boxes, 1, 1) + shift * half * cfg.box_noise).clamp(0, 1)     # xyxy in 0..1
    boxes = from_pixels(corners, 1, 1).clamp(min=0)            # corners may have passed each other: then the side is 0
    labels = torch.where(redrawn, other, labels).masked_fill(labels < 0, cfg.num_classes)
    # 3) matching queries, as group -1, see each other only, a denoising query its group and them: else true boxes would
    # leak to the matching queries, or between groups
    group = F.pad(torch.arange(D, device=device) // (2 * M), (0, Q), value=-1)        # (D + Q,)
    return labels, boxes, (group[:, None] == group) | (group == -1)


@torch.no_grad()
def match(layers, targets, size):
    """
    Hungarian matching. layers: a list of logits (B, Q, K) and boxes (B, Q, 4) cx, cy, w, h; size (H, W) of the image
    -> for each layer the cheapest pairs, (3, n): image, query, object. All objects are in them if Q is large enough.
    """
    labels, gt_boxes = targets['labels'], targets['boxes'].float()
    costs = []
    for logits, boxes in layers:
        p = logits.sigmoid().take_along_dim(labels.clamp(min=0)[:, None], 2)          # (B, Q, M)
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()                            # focal loss as this class,
        negative = 0.75 * p ** 2 * -(1 - p + 1e-8).log()                              # and as background
        l1 = (boxes[:, :, None] - from_pixels(gt_boxes, *size)[:, None]).abs().sum(-1)
        giou = bbox_iou(to_pixels(boxes, *size)[:, :, None], gt_boxes[:, None], 'giou')
        costs.append(CLASS_COST * (positive - negative) + L1_COST * l1 - GIOU_COST * giou)
    # all layers in one transfer; NaN and infinity, at which the solver raises, become the last choice
    costs = torch.stack(costs).nan_to_num(1e4, 1e4, 1e4).cpu().numpy()
    is_object, pairs = (labels >= 0).cpu().numpy(), []
    for layer in costs:
        for image, cost in enumerate(layer):
            objects = is_object[image].nonzero()[0]
            query, column = linear_sum_assignment(cost[:, objects])
            pairs.append(np.stack((np.full_like(query, image), query, objects[column])))
    return torch.from_numpy(np.concatenate(pairs, 1)).to(labels.device).chunk(len(layers), 1)  # as many in each layer


def class_loss(logits, iou, positive, kind):
    """Elementwise, all (...): weighted binary cross entropy towards the IoU of the matched box, or 0."""
    p = logits.detach().sigmoid()
    if kind == 'vfl':                                                                 # a bad match is hardly taught
        target, weight = iou, torch.where(positive, iou, 0.75 * p ** 2)
    else:                                                         # mal: a bad match is taught not to be confident
        target, weight = iou ** 1.5, torch.where(positive, 1.0, p ** 1.5)
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction='none')


def set_loss(logits, boxes, pairs, targets, size, kind, counted=True):
    """
    One layer: logits (B, Q, K), boxes (B, Q, 4), pairs (3, n) as from `match` -> dict(cls=, l1=, giou=), weighted sums.
    counted (B, Q, 1): which queries have a class loss. Without objects, sums over nothing keep the graph.
    """
    image, query, gt = pairs
    box, gt_box = boxes[image, query], targets['boxes'][image, gt].float()            # (n, 4) each
    pixels = to_pixels(box, *size)              # IoU has no unit, but bbox_iou's eps is not small beside areas in 0..1
    at = image, query, targets['labels'][image, gt]
    iou, positive = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    iou[at], positive[at] = bbox_iou(pixels.detach(), gt_box), True
    cls = class_loss(logits, iou, positive, kind) * counted                           # (B, Q, K)
    l1 = (box - from_pixels(gt_box, *size)).abs()                                     # (n, 4)
    giou = 1 - bbox_iou(pixels, gt_box, 'giou')                                       # (n,)
    return dict(cls=CLASS_WEIGHT * cls.sum(), l1=L1_WEIGHT * l1.sum(), giou=GIOU_WEIGHT * giou.sum())


# --- the head: everything behind the backbone ------------------------------------------------------------------------

class DETRHead(nn.Module):
    """
    features (p3, p4, p5) at strides 8, 16, 32 with `channels` each -> raw, losses.

    raw: boxes (B, Q, 4) xyxy input pixels and scores (B, Q, K) probabilities, float32, of the last layer that ran.
    losses: {} without targets, else {'detr': (sums, number of objects)}. sums: cls, l1, giou of the last layer; aux_*,
    the other layers' and query selection's added up; dn_*, denoising's over all layers, divided by its groups.
    """

    def __init__(self, channels, cfg):
        super().__init__()
        c, K, layers = cfg.hidden, cfg.num_classes, range(cfg.decoder_layers)
        self.cfg = cfg
        self.encoder = HybridEncoder(channels, cfg)
        self.decoder_input_proj = nn.ModuleList(ConvNorm(c, c, act=False) for _ in STRIDES)
        self.enc_output = nn.Sequential(nn.Linear(c, c), nn.LayerNorm(c))             # query selection
        self.enc_score_head = nn.Linear(c, K)
        self.enc_bbox_head = MLP(c, c, c, 4)
        self.denoising_class_embed = nn.Embedding(K + 1, c, padding_idx=K) if cfg.denoising else None
        self.query_pos_head = MLP(4, 2 * c, c)                                        # decoder
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in layers)
        self.class_embed = nn.ModuleList(nn.Linear(c, K) for _ in layers)
        self.bbox_embed = nn.ModuleList(MLP(c, c, c, 4) for _ in layers)
        for linear in (self.enc_score_head, *self.class_embed):
            nn.init.constant_(linear.bias, -math.log(99))                             # every score starts near 0.01
        for mlp in (self.enc_bbox_head, *self.bbox_embed):
            for parameter in mlp.layers[-1].parameters():
                nn.init.zeros_(parameter)                                             # a box starts at its reference
        for linear in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(linear.weight)

    def select_queries(self, maps, H, W):
        """
        Three encoded maps of H x W images -> memory (B, N, C) and the shapes of its levels; the Q tokens with the
        highest class logit, at which the decoder starts, detached: content (B, Q, C), reference (B, Q, 4) box logits;
        and, for a loss of their own, their logits (B, Q, K) and boxes (B, Q, 4).
        """
        levels = [proj(m).flatten(2) for proj, m in zip(self.decoder_input_proj, maps, strict=True)]
        memory = torch.cat(levels, 2).transpose(1, 2)                                 # (B, N, C)
        # 1) a token's box starts as an anchor around its cell: 0.05, 0.1, 0.2 of the image wide and high. Cells too
        # close to the border, where a logit grows without bound, propose nothing
        points, strides = make_anchor_points(maps, STRIDES)                           # (N, 2), (N, 1) pixels
        side = strides[:, 0] * (0.05 / STRIDES[0])
        anchors = torch.stack((points[:, 0] / W, points[:, 1] / H, side, side), -1)   # (N, 4) cx, cy, w, h
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)           # (N, 1), false at the border
        anchors = anchors.logit().masked_fill(~valid, torch.inf)
        # 2) those that are surest of some class are the queries
        tokens = self.enc_output(memory * valid)                                      # (B, N, C)
        logits = self.enc_score_head(tokens).float()                                  # (B, N, K)
        Q = torch.sym_min(self.cfg.queries, logits.shape[1])                          # a symbol, in dynamic exports
        best = logits.detach().amax(-1).topk(Q, 1).indices                            # (B, Q)
        content, logits = (t.gather(1, best[..., None].expand(-1, -1, t.shape[2])) for t in (tokens, logits))
        reference = self.enc_bbox_head(content).float() + anchors[best]                        # (B, Q, 4)
        return memory, [m.shape[2:] for m in maps], content.detach(), reference.detach(), logits, reference.sigmoid()

    def decode(self, x, reference, memory, shapes, mask=None):
        """Content (B, L, C), reference (B, L, 4) box logits -> for each layer logits (B, L, K) and boxes (B, L, 4)."""
        reference, before, layers = reference.sigmoid(), None, []
        for i in range(self.cfg.decoder_layers if self.training else self.cfg.eval_layers or self.cfg.decoder_layers):
            x = self.layers[i](x, self.query_pos_head(reference.to(x.dtype)), reference, memory, shapes, mask)
            delta = self.bbox_embed[i](x).float()
            boxes = refined = (delta + reference.logit(EPS)).sigmoid()
            if before is not None and self.cfg.look_forward_twice:                    # the same numbers, but the loss
                boxes = (delta + before.logit(EPS)).sigmoid()                   # reaches the layer before, too
            layers.append((self.class_embed[i](x).float(), boxes))
            before, reference = refined, refined.detach()
        return layers

    def forward(self, features, targets=None):
        size = tuple(STRIDES[0] * side for side in features[0].shape[2:])
        memory, shapes, x, reference, *selected = self.select_queries(self.encoder(features), *size)
        D, mask = 0, None
        if targets is not None and self.training and self.cfg.denoising and targets['labels'].shape[1]:
            noisy_labels, noisy_boxes, mask = denoising_queries(targets, size, self.cfg, x.shape[1])
            D = noisy_labels.shape[1]
            x = torch.cat((self.denoising_class_embed(noisy_labels).to(x.dtype), x), 1)  # (B, D + Q, C)
            reference = torch.cat((noisy_boxes.logit(EPS), reference), 1)       # (B, D + Q, 4)
        layers = self.decode(x, reference, memory, shapes, mask)
        logits, boxes = (t[:, D:] for t in layers[-1])
        raw = to_pixels(boxes, *size), logits.sigmoid()
        if targets is None:
            return raw, {}
        with autocast_off(memory):
            sums = self.losses(layers, D, selected, targets, size)
        return raw, {'detr': (sums, (targets['labels'] >= 0).sum().float())}

    def losses(self, layers, D, selected, targets, size):
        """Sums by name, of the decoder's layers (B, D + Q, ...) and of query selection (B, Q, ...)."""
        kind, is_object = self.cfg.class_loss, targets['labels'] >= 0                 # (B, M)
        matching = [*((logits[:, D:], boxes[:, D:]) for logits, boxes in layers), selected]
        found = [set_loss(*layer, pairs, targets, size, kind)
                 for layer, pairs in zip(matching, match(matching, targets, size), strict=True)]
        *earlier, sums, selection = found                                             # sums: of the last decoder layer
        sums |= {f'aux_{name}': sum(losses[name] for losses in (*earlier, selection)) for name in sums}
        if D:                                                         # positive s of each group belongs to object s
            groups = D // (2 * is_object.shape[1])
            image, slot = is_object.nonzero(as_tuple=True)                            # (n,) each
            start = torch.arange(0, D, D // groups, device=slot.device)[:, None]      # (groups, 1)
            pairs = image.repeat(groups), (start + slot).flatten(), slot.repeat(groups)
            counted = is_object.repeat(1, 2 * groups)[..., None]                      # (B, D, 1)
            found = [set_loss(logits[:, :D], boxes[:, :D], pairs, targets, size, kind, counted)
                     for logits, boxes in layers]
            sums |= {f'dn_{name}': sum(losses[name] for losses in found) / groups for name in found[0]}
        return sums


class DETR(nn.Module):
    """
    A detector as HSVDET is one: the same methods, and the same attributes cfg, names, imgsz, fixed_imgsz, nms (never),
    checkpointing (of the backbone, where most of the memory is) and LOSSES, the names in losses['detr']. The backbone
    is model.py's at cfg.scale, trained whole, or a frozen DINOv2 with LoRA adapters.
    """

    arch = 'rtdetr'
    rect = False                                   # boxes are shares of the input, as it was trained: see model.HSVDET

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.names = [f'class{i}' for i in range(cfg.num_classes)]
        self.imgsz, self.fixed_imgsz, self.best_f1, self.frames = None, None, None, 0
        self.checkpointing, self.nms = False, False
        layers = ('', 'aux_', 'dn_') if cfg.denoising else ('', 'aux_')
        self.LOSSES = tuple(f'{layer}{name}' for layer in layers for name in ('cls', 'l1', 'giou'))
        if cfg.backbone_weights:
            self.backbone = DINOv2.from_pretrained(cfg.backbone_weights, position_resize=cfg.position_resize)
            if self.backbone.variant() != cfg.backbone:                               # a checkpoint has the name alone
                raise InputError(f'--backbone_weights={cfg.backbone_weights} is no {cfg.backbone}: give --backbone='
                                 + (self.backbone.variant() or f'..., but it is none of {" ".join(VARIANTS)}'))
        else:
            self.backbone = Backbone(cfg.scale) if not cfg.backbone else DINOv2(
                **VARIANTS[cfg.backbone], position_resize=cfg.position_resize)
        if cfg.backbone and cfg.lora_rank:
            self.backbone.add_lora(cfg.lora_rank, layers=cfg.lora_layers, matrices=cfg.lora_matrices)
        self.head = DETRHead(self.backbone.channels, cfg)

    def blocks(self):
        """The attention blocks there are, by level: dict(p5=...) with encoder_attn='S'."""
        return dict(p5=self.head.encoder.aifi.block) if self.cfg.encoder_attn == 'S' else {}

    def forward(self, images, targets=None):
        """images (B, 3, H, W) in 0..1, H and W multiples of 32 -> raw, losses: see DETRHead."""
        H, W = images.shape[2:]
        assert H % 32 == 0 and W % 32 == 0, f'image sides must be multiples of 32, got {H}x{W}'
        return self.head(self.backbone(images, self.run), targets)

    def decode(self, raw):
        """raw is decoded already: boxes (B, Q, 4) in input pixels, scores (B, Q, K)."""
        return raw

    # word for word HSVDET's: of raw they see what decode() makes of it, and nms is False
    run, postprocess, detect = HSVDET.run, HSVDET.postprocess, HSVDET.detect
    checkpoint, save = HSVDET.checkpoint, HSVDET.save

    def fuse(self):
        """Inference form, in place: HSVDET's; then RepVGG's two convolutions become one, LoRA's adapters none."""
        HSVDET.fuse(self)
        for module in self.modules():
            if isinstance(module, RepVGG):
                module.fuse()
            elif isinstance(module, DINOv2):
                module.merge_lora()
        return self

    def param_groups(self, lr, weight_decay, factors=None):
        """As HSVDET's. The hybrid encoder is the neck, the sparse block in it the block, the rest is the head."""
        part_of = (('backbone.', 'backbone'), ('head.encoder.aifi.block.', 'block'), ('head.encoder.', 'neck'),
                   ('head.', 'head'))
        return make_param_groups(self, part_of, lr, weight_decay, factors)

    def loss_parameters(self):
        """All losses share one normalizer, the number of objects: all parameters belong to one part."""
        return dict(detr=list(self.parameters()))

    @classmethod
    def from_pretrained(cls, path, verbose=True, **overrides):
        """
        A model with the weights of `path`: of a checkpoint of this architecture all that fits (other classes start
        fresh, and so do another encoder_attn, denoising and more decoder layers), of another its backbone. Overrides
        are DETRConfig's fields. Raises InputError.
        """
        saved = read_weights(path)
        ours, weights, names = saved['arch'] == 'rtdetr', saved['weights'], saved['names']
        known = saved['config'] if ours else dict(scale=saved['config']['scale'], num_classes=len(names))
        known['backbone_weights'] = ''                                                # DINOv2's weights are in the file
        cfg = build(DETRConfig, {**known, **overrides}, among=overrides)
        model = cls(cfg)
        model.imgsz = saved['imgsz']
        other_classes = cfg.num_classes != len(names)
        if not other_classes:
            model.names = list(names)
        by_class = ('head.enc_score_head', 'head.class_embed', 'head.denoising_class_embed')
        optional = ('head.encoder.aifi.block', 'head.encoder.aifi.self_attn', 'head.denoising_class_embed',
                    'head.layers', 'head.class_embed', 'head.bbox_embed') if ours else 'head.'
        fill(model, weights, path, verbose=verbose,
             may_be_fresh=lambda name: (name.startswith(optional) and name not in weights
                                        or other_classes and name.startswith(by_class)),
             may_be_left=lambda name: name.startswith(optional) if ours else not name.startswith('backbone.'))
        return model

"""
DINOv2: a vision transformer pretrained without labels, as a frozen backbone with low-rank adapters (LoRA).

    backbone = DINOv2.from_pretrained('dinov2_vits14_pretrain.pth')     # torch.hub's or transformers' key names
    backbone.add_lora(rank=4)                                           # now the adapters and the pyramid train
    p3, p4, p5 = backbone(images)                                       # images (B, 3, H, W) in 0..1, strides 8, 16, 32

Under RT-DETR, with a file of published weights:

    python train.py config/rtdetr_own.py --train_data=my/train.json --val_data=my/val.json \
        --hidden=256 --decoder_layers=6 --backbone=dinov2_s --backbone_weights=dinov2_vits14_pretrain.pth

`DINOv2(**VARIANTS['dinov2_s'])` is the same network with random weights. The transformer's own weights are frozen from
the start (`freeze(False)` tunes them too); `merge_lora()` folds trained adapters into them, at no cost in speed.

What it does not do: DINOv2's own training (the mask token is dropped), the giant model (its MLP is a SwiGLU), windowed
attention, dropout and stochastic depth.

Papers: DINOv2, Oquab et al. 2023 (2304.07193); registers, Darcet et al. 2023 (2309.16588); ViT, Dosovitskiy et al. 2020
(2010.11929); LayerScale, Touvron et al. 2021 (2103.17239); LoRA, Hu et al. 2021 (2106.09685); ViTDet, Li et al. 2022
(2203.16527), whose pyramid from a single-scale transformer ours resembles.
"""
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configurator import InputError
from model import Conv, call
from sparse_attention import autocast_off

PATCH = 14                                                         # pixels; every DINOv2 has this patch size
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)           # of ImageNet, RGB in 0..1
MATRICES = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')

VARIANTS = {  # parameters: 22.06 M and 86.58 M
    'dinov2_s':     dict(width=384, depth=12, heads=6, registers=0),
    'dinov2_b':     dict(width=768, depth=12, heads=12, registers=0),
    'dinov2_s_reg': dict(width=384, depth=12, heads=6, registers=4),
    'dinov2_b_reg': dict(width=768, depth=12, heads=12, registers=4),
}

RENAMES = (  # torch.hub's and transformers' (old and new) names -> ours, applied in this order
    ('patch_embed.proj.', 'patch_embed.'), ('patch_embeddings.projection.', 'patch_embed.'),
    ('position_embeddings', 'pos_embed'), ('embeddings.', ''), ('encoder.layer.', 'blocks.'), ('layernorm.', 'norm.'),
    ('attn.qkv.', 'qkv.'), ('attn.proj.', 'proj.'), ('mlp.', ''),
    ('attention.attention.query.', 'q.'), ('attention.attention.key.', 'k.'), ('attention.attention.value.', 'v.'),
    ('attention.q_proj.', 'q.'), ('attention.k_proj.', 'k.'), ('attention.v_proj.', 'v.'),
    ('attention.output.dense.', 'proj.'), ('attention.o_proj.', 'proj.'),
    ('layer_scale1.lambda1', 'ls1'), ('layer_scale2.lambda1', 'ls2'), ('ls1.gamma', 'ls1'), ('ls2.gamma', 'ls2'),
)


# --- layers ----------------------------------------------------------------------------------------------------------

class LoRALinear(nn.Linear):
    """
    y = W x + b, and after `add_lora` y = W x + b + (alpha / rank) B A x.

    B starts at zero, so that step 0 is exactly the pretrained layer. Two thin products instead of W + B A: no gradient
    of W's size is ever formed. The names of W and b are the same with and without an adapter.
    """

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out)
        self.register_parameter('lora_a', None)
        self.register_parameter('lora_b', None)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def add_lora(self, rank, alpha, rows=None):
        """`rows`: indices of the outputs that are adapted, all by default."""
        assert self.lora_a is None, 'this layer has an adapter already: merge it first'
        device = self.weight.device
        rows = torch.arange(self.out_features) if rows is None else rows
        self.register_buffer('rows', rows.to(device), persistent=False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(len(rows), rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def full_b(self):
        """B with zero rows for the outputs that are not adapted. (c_out, rank)"""
        b = self.lora_b.new_zeros(self.out_features, self.lora_b.shape[1])
        return b.index_copy(0, self.rows, self.lora_b)

    def forward(self, x):
        y = super().forward(x)                                                        # (..., c_out)
        if self.lora_a is None:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.full_b())

    @torch.no_grad()
    def merge_lora(self):
        if self.lora_a is not None:
            self.weight += self.scale * self.full_b() @ self.lora_a
            self.lora_a = self.lora_b = None


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP of ratio 4, each scaled per channel. (B, T, C) -> (B, T, C)"""

    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(c, eps=1e-6)
        self.qkv = LoRALinear(c, 3 * c)
        self.proj = LoRALinear(c, c)
        self.norm2 = nn.LayerNorm(c, eps=1e-6)
        self.fc1 = LoRALinear(c, 4 * c)
        self.fc2 = LoRALinear(4 * c, c)
        self.ls1 = nn.Parameter(torch.ones(c))                     # LayerScale: the published weights have learned
        self.ls2 = nn.Parameter(torch.ones(c))                     # it, and their features are wrong without it

    def attention(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)   # (B, nh, T, hs) each
        wide = torch.promote_types(x.dtype, torch.float32)
        with autocast_off(x):
            y = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide)).to(x.dtype)        # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.ls1 * self.attention(self.norm1(x))
        return x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Pyramid(nn.Module):
    """
    The maps of several transformer layers, all at stride 16, -> p3, p4, p5 of `c` channels at strides 8, 16, 32.

    Joined by one 1x1 convolution (early layers hold edges and places, late ones meaning); then x2 up and x2 down.
    As in ViTDet, but lean: the 3x3 convolutions that refine the levels are the neck's that follows.
    """

    def __init__(self, c_in, c):
        super().__init__()
        self.join = Conv(c_in, c)
        self.up = nn.Sequential(Conv(c, 4 * c), nn.PixelShuffle(2))                   # a 2x2 deconvolution of stride 2
        self.down = Conv(c, c, 3, 2)

    def forward(self, x):
        p4 = self.join(x)                                                             # (B, c, H / 16, W / 16)
        return self.up(p4), p4, self.down(p4)


# --- weights of others -----------------------------------------------------------------------------------------------

def read_state_dict(path):
    """A file of weights -> dict of name -> tensor, without running any code of the file's. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f'--backbone_weights={path}: no such file; download dinov2_vits14_pretrain.pth from '
                         'github.com/facebookresearch/dinov2 (pretrained models) and give its path')
    if str(path).endswith('.safetensors'):
        raise InputError(f'{path} is a safetensors file, which is not read: give a .pth or pytorch_model.bin')
    try:
        if str(path).endswith('.npz'):
            with np.load(path, allow_pickle=False) as file:
                state = {key: torch.from_numpy(file[key]) for key in file.files}
        else:
            state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:                                         # there is no end to what a wrong file can raise
        why = ' '.join(str(e).split())[:200]
        raise InputError(f'{path} was refused: no weights can be read from it without running code ({why})') from None
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        raise InputError(f'{path} was refused: it must hold a state dict, names to tensors, as torch.hub publishes it')
    return state


def rename_weights(state):
    """torch.hub's or transformers' names -> ours. Separate q, k, v (transformers) are joined to one qkv."""
    renamed = {}
    for key, value in state.items():
        for old, new in RENAMES:
            key = key.replace(old, new)
        if key != 'mask_token':                                    # used in DINOv2's own training only
            renamed[key] = value
    for q in [key for key in renamed if '.q.' in key]:
        names = [q.replace('.q.', f'.{part}.') for part in 'qkv']
        alike = all(name in renamed and renamed[name].shape == renamed[q].shape for name in names)
        if alike and renamed[q].ndim:                              # else check_weights reports them
            renamed[q.replace('.q.', '.qkv.')] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def infer_architecture(state, path):
    """Width, depth, registers and the trained image side from our names and their shapes. Raises InputError."""
    for key in ('pos_embed', 'cls_token', 'patch_embed.weight'):
        if key not in state:
            raise InputError(f'{path} was refused: it has no {key}, so it is not a DINOv2 vision transformer')
    shape = tuple(state['pos_embed'].shape)
    side = math.isqrt(max(shape[1] - 1, 0)) if len(shape) == 3 else 0                 # the trained grid, in patches
    if side == 0 or shape != (1, side * side + 1, shape[2]):
        raise InputError(f'{path} was refused: pos_embed must be (1, 1 + side * side, width), got {shape}')
    tokens = state.get('register_tokens')
    registers = tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0
    depth = len({key.split('.')[1] for key in state if key.startswith('blocks.')})
    return dict(width=shape[2], depth=depth, registers=registers, pretrain_size=PATCH * side)


def check_weights(state, expected, path):
    """Same names and same shapes on both sides, or an InputError that names the first few that differ."""
    missing = [f'{key} is missing' for key in expected if key not in state]
    unknown = [f'{key} is unknown' for key in state if key not in expected]
    other = [f'{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}' for key in expected
             if key in state and state[key].shape != expected[key].shape]
    wrong = missing + unknown + other
    if wrong:
        more = f' and {len(wrong) - 6} more' if len(wrong) > 6 else ''
        raise InputError(f'{path} does not fit a DINOv2 of size S or B: {", ".join(wrong[:6])}{more}')


# --- the backbone ----------------------------------------------------------------------------------------------------

class DINOv2(nn.Module):
    """
    DINOv2 with LoRA adapters as a detector's backbone; `channels` = (c3, c4, c5) are those of its three maps.

    image           (B, 3, H, W)             H and W multiples of 32
    resized         (B, 3, H*14/16, W*14/16)
    tokens          (B, 1 + R + H*W/256, width)  CLS, R registers, then one token per 16x16 pixels of the image
    p3, p4, p5      (B, c, H/s, W/s)         s = 8, 16, 32

    layers: the blocks, counted from 1, whose tokens become the maps; by default four evenly spaced (3, 6, 9, 12 of 12).
    pretrain_size: side in pixels of the images that the position embedding was trained on.
    position_resize: how that embedding is resized bicubically to another grid,
        'size'       to the exact size, as transformers does; the default without registers
        'antialias'  to the exact size with antialiasing, as torch.hub's models with registers do; the default with them
        'scale'      by (size + 0.1) / trained size, as torch.hub's models without registers do: up to 0.1 token off
    Raises InputError.
    """

    def __init__(self, width=384, depth=12, heads=6, registers=0, pretrain_size=518, position_resize=None, layers=(),
                 pyramid_width=256):
        super().__init__()
        self.registers = registers
        self.position_resize = position_resize or ('antialias' if registers else 'size')
        spaced = {-(-depth * i // 4) for i in (1, 2, 3, 4)}        # rounded up; fewer than four if the depth is
        self.layers = tuple(sorted(set(layers) or spaced))
        for ok, sentence in (
                (width % heads == 0, f'heads must divide the width, got {heads} heads and width {width}'),
                (pretrain_size % PATCH == 0, f'pretrain_size must be a multiple of {PATCH}, got {pretrain_size}'),
                (set(self.layers) <= set(range(1, depth + 1)),
                 f'layers must be block numbers from 1 to {depth}, got {self.layers}'),
                (self.position_resize in ('size', 'scale', 'antialias'),
                 f'position_resize must be size, scale or antialias, got {position_resize!r}')):
            if not ok:
                raise InputError(sentence)
        self.side = pretrain_size // PATCH                         # patches per side of the trained grid
        self.register_buffer('mean', torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 1e-6)
        self.register_tokens = nn.Parameter(torch.randn(1, registers, width) * 1e-6) if registers else None
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.side ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pyramid = Pyramid(len(self.layers) * width, pyramid_width)
        self.channels = (pyramid_width,) * 3
        self.freeze()

    @classmethod
    def from_pretrained(cls, path, heads=None, **settings):
        """
        A .pt, .pth, .bin or .npz file with torch.hub's or transformers' names -> the model, its pyramid at random.

        The architecture comes from the shapes, except `heads`, which they do not tell: by default 64 channels each, as
        in every published model. `settings` are those of the constructor. Raises InputError.
        """
        state = rename_weights(read_state_dict(path))
        shapes = infer_architecture(state, path)
        if heads is None and shapes['width'] % 64:
            raise InputError(f'{path}: give heads=, the number cannot be told from a width of {shapes["width"]}')
        model = cls(**{**shapes, 'heads': heads or shapes['width'] // 64, **settings})
        expected = {key: value for key, value in model.state_dict().items() if not key.startswith('pyramid.')}
        check_weights(state, expected, path)
        model.load_state_dict(state, strict=False)                 # checked above; all but the pyramid is there
        return model

    def variant(self):
        """The name in VARIANTS of a network of this shape; '' if it has none."""
        shape = self.norm.normalized_shape[0], len(self.blocks), self.registers, self.side
        return next((name for name, v in VARIANTS.items()
                     if shape == (v['width'], v['depth'], v['registers'], v.get('pretrain_size', 518) // PATCH)), '')

    def freeze(self, frozen=True):
        """Freeze the transformer (or unfreeze it); adapters and pyramid always train."""
        for name, parameter in self.named_parameters():
            if not name.startswith('pyramid.') and 'lora_' not in name:
                parameter.requires_grad_(not frozen)
        return self

    def add_lora(self, rank=4, alpha=None, layers='all', matrices='qkv'):
        """
        Adapters of rank `rank`, scaled by alpha / rank (1 by default), to `matrices` of the blocks `layers`.

        layers: 'all' or block numbers counted from 1. matrices: names among q k v proj fc1 fc2, as in 'qkv', 'q,v' or
        ('q', 'fc1'). q, k and v are one matrix in DINOv2 and get one adapter, which shares A: 73,728 parameters at
        rank 4 on S/14, where three separate ones would have 110,592. Raises InputError.
        """
        names = (matrices if isinstance(matrices, str) else ','.join(matrices)).replace('qkv', 'q,k,v')
        names = [name.strip() for name in names.split(',')]
        numbers = range(1, len(self.blocks) + 1)
        width = self.norm.normalized_shape[0]
        if not set(names) <= set(MATRICES):
            raise InputError(f'LoRA matrices must be among {" ".join(MATRICES)}, got {matrices!r}')
        if layers != 'all' and not (set(layers) and set(layers) <= set(numbers)):
            raise InputError(f"LoRA layers must be 'all' or block numbers from 1 to {len(self.blocks)}, got {layers!r}")
        if type(rank) is not int or not 1 <= rank <= width:
            raise InputError(f'LoRA rank must be from 1 to {width}, got {rank!r}')
        alpha = rank if alpha is None else alpha
        parts = [i for i, part in enumerate('qkv') if part in names]
        rows = torch.arange(3 * width).view(3, width)[parts].flatten()                # of the qkv matrix
        for number in numbers if layers == 'all' else sorted(set(layers)):
            block = self.blocks[number - 1]
            if parts:
                block.qkv.add_lora(rank, alpha, rows)
            for name in ('proj', 'fc1', 'fc2'):
                if name in names:
                    getattr(block, name).add_lora(rank, alpha)
        return self

    def merge_lora(self):
        """Fold the adapters into the frozen matrices, in place: same outputs, the speed of the plain network."""
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.merge_lora()
        return self

    def position_embedding(self, h, w):
        """The trained position embedding, resized to h x w patches: (1, 1 + h * w, width)"""
        if (h, w) == (self.side, self.side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)     # (1, C, side, side)
        if self.position_resize == 'scale':
            scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
            grid = F.interpolate(grid, scale_factor=scale, mode='bicubic')            # (1, C, h, w)
        else:
            grid = F.interpolate(grid, size=(h, w), mode='bicubic', antialias=self.position_resize == 'antialias')
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), 1)

    def forward_features(self, images, layers=None, norm=True, run=call):
        """
        Normalized images (B, 3, 14 h, 14 w) -> a list of tokens (B, 1 + R + h * w, width), one for each of `layers`.

        `norm`: with the final LayerNorm, which brings all layers to one scale. Autograd starts at the first adapter:
        what comes before keeps no activations.
        """
        B, _, H, W = images.shape
        assert H % PATCH == 0 and W % PATCH == 0, f'image sides must be multiples of {PATCH}, got {H}x{W}'
        layers = self.layers if layers is None else layers
        pos = self.position_embedding(H // PATCH, W // PATCH)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + pos[:, 1:]    # (B, h * w, C)
        prefix = self.cls_token + pos[:, :1]                                          # (1, 1, C)
        if self.registers:
            prefix = torch.cat((prefix, self.register_tokens), 1)                     # they have no position
        x = torch.cat((prefix.expand(B, -1, -1), patches), 1)                         # (B, 1 + R + h * w, C)
        tokens = {}
        for number, block in enumerate(self.blocks[:max(layers)], 1):
            x = run(block, x)
            tokens[number] = x
        return [self.norm(tokens[number]) if norm else tokens[number] for number in layers]

    def forward(self, images, run=call):
        """images (B, 3, H, W) in 0..1, H and W multiples of 32 -> p3, p4, p5 at strides 8, 16, 32. run: HSVDET.run."""
        _, _, H, W = images.shape
        assert H % 32 == 0 and W % 32 == 0, f'image sides must be multiples of 32, got {H}x{W}'
        # The patch is 14 px and the heads want strides 8, 16, 32. Shrinking the image by 14/16 makes each patch exactly
        # one 16x16 cell of the input: strides are exact, no head changes. The other ways lose: padding to multiples of
        # 14 gives a stride of 14, and resampling the tokens from 14 to 16 px blurs them after paying for 31 % more of
        # them. At 640 px the network sees 560 px, near the 518 it was trained at.
        h, w = H // 16, W // 16
        x = F.interpolate(images, size=(h * PATCH, w * PATCH), mode='bilinear', align_corners=False)
        x = (x - self.mean) / self.std
        maps = [tokens[:, 1 + self.registers:].transpose(1, 2).unflatten(2, (h, w))   # (B, C, h, w) each
                for tokens in self.forward_features(x, run=run)]
        return self.pyramid(torch.cat(maps, 1))

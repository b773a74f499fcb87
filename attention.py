"""
The other letters of the `attn` string: kinds of attention to compare with the sparse block, S (sparse_attention.py).

A mixer is built by (c, cfg); cfg has k, select, heads, pos, keep, kernel, as HSVDETConfig does. forward(x,
memory=None) -> y, x and y (B, C, H, W) of any size, y without the residual; memory (B, T, C) is tokens from another
level or frame that the queries may attend to as well. (T and P, which select tokens, take two more arguments, as S
does.) `Gated` adds the residual and the gate around a mixer. S, F and D are no mixers: they have both built in
(SparseGlobalBlockGated), because there the gate multiplies a weight instead of the output. HELP says in a line what
each letter is and what it costs; make_block builds one.

Each letter's class has forward_reference (C needs none), its definition with the same weights: dense, masked, as slow
as it reads. forward is the fast path, and tests/test_attention.py compares the two in float64. Logits, softmax and sums
are float32 under autocast, the linear maps around them are not. Queries and keys are layer-normed, as in S. All of them
export to ONNX, with free image sizes too.

P alone has what published attention blocks add and the others lack (RT-DETR's AIFI; PSA of YOLOv10, 2405.14458; area
attention of YOLOv12, 2502.12524): narrow heads, a depthwise convolution for positions, a feed-forward layer, and last
maps that start at zero instead of a gate.

Papers: windows with a halo, HaloNet, Vaswani et al. 2021 (2103.12731); latent attention, DeepSeek-V2, 2024
(2405.04434); native sparse attention, Yuan et al. 2025 (2502.11089); kernel density, Epanechnikov 1969; attention as
kernel smoothing, Tsai et al. 2019 (1908.11775); linear attention, Katharopoulos et al. 2020 (2006.16236); Fourier
mixing, FNet, Lee-Thorp et al. 2021 (2105.03824); tokens that skip a layer, Mixture-of-Depths, Raposo et al. 2024
(2404.02258).
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configurator import InputError
from sparse_attention import (
    SparseGlobalBlock,
    SparseGlobalBlockGated,
    autocast_off,
    layer_norm,
    make_gate,
    project,
    sincos_2d,
    stable_topk,
)

TILE = 8                                                             # cells on the side of a tile of queries (W, N)
RADIUS = 4                                                           # a window is 2 * 4 + 1 = 9 cells wide (W, N)
NUM_CHOSEN = 4                                                       # tiles that are attended to token by token (N)
HELP = {  # letter: what it is, FLOPs per token (two per multiply-add; c channels, N tokens, k selected ones)
    '-': 'no attention',
    'S': 'sparse global: the k most salient tokens see each other; 2c^2 + (4kc^2 + 4k^2 c) / N',
    'F': 'full: every token sees every token; 6c^2 + 4Nc',
    'D': "S's dense path alone, nobody attends (the control); 2c^2",
    'C': 'two 3x3 convolutions with as many parameters as S, no attention (a control of equal size); 8c^2',
    'W': 'sliding window: every token sees the 9x9 cells around it; 8c^2 + 1024c',
    'L': 'latent (MLA): full, keys and values in c/4 channels; 1.5c^2 + Nc with one head',
    'N': 'native sparse: means of all tiles + the 4 best tiles + a 9x9 window; 8c^2 + 6c + 4c(N/64 + 512)',
    'K': 'kernel density: tokens within a bandwidth of the query, all others weigh 0; 8c^2 + 4Nc (or --kernel=linear)',
    'M': 'Fourier mixing (FNet): a fixed transform without weights; about 5c log2(Nc), no matrix products',
    'T': 'tokens only: the k selected tokens attend and change, all others stay; (8kc^2 + 4k^2 c) / N',
    'P': 'a published layer on the k selected tokens: T, narrow heads, 7x7 positions, MLP; (16kc^2 + 4k^2 c) / N + 98c',
}
print_once = functools.cache(print)             # a fallback is reported once per process, not once per step


def tokens(x):
    """(B, C, H, W) -> (B, N, C), a view"""
    return x.flatten(2).transpose(1, 2)


def masked_attention(q, k, v, mask=None):
    """The definition: q (B, heads, n, d), k and v (B, heads, m, d); mask, bool, says which of m a query sees."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                         # (B, heads, n, m)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


class Projections(nn.Module):
    """What W, N and K share: the four linear maps around attention (8 N c^2 FLOPs), heads, layer norm of q and k."""

    def __init__(self, c, heads, pos):
        super().__init__()
        assert c % heads == 0, f'{c} channels do not divide into {heads} heads'
        self.heads, self.pos = heads, pos
        self.q_proj = nn.Linear(c, c, bias=False)
        self.k_proj = nn.Linear(c, c, bias=False)
        self.v_proj = nn.Linear(c, c, bias=False)
        self.out_proj = nn.Linear(c, c, bias=False)
        self.norm = nn.LayerNorm(c)

    def forward(self, x, memory=None):
        """x (B, C, H, W) -> q (B, heads, N, d), k and v (B, heads, N + T, d), float32 at least; memory comes last."""
        B, C, H, W = x.shape
        t = tokens(x)                                                                 # (B, N, C)
        positioned = t + sincos_2d(H, W, C, x.device).to(t.dtype) if self.pos else t
        q, k, v = self.q_proj(positioned), self.k_proj(positioned), self.v_proj(t)
        if memory is not None:
            k = torch.cat((k, self.k_proj(memory)), 1)                                # (B, N + T, C)
            v = torch.cat((v, self.v_proj(memory)), 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        with autocast_off(x):
            q, k = layer_norm(self.norm, q.to(wide)), layer_norm(self.norm, k.to(wide))
            return [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v.to(wide))]

    def join(self, t, x):
        """t (B, heads, N, d) -> (B, C, H, W), the heads joined by the last linear map, for an input x."""
        t = self.out_proj(t.transpose(1, 2).flatten(2).to(x.dtype))                   # (B, N, C)
        return t.transpose(1, 2).unflatten(2, x.shape[2:])                            # (B, C, H, W)


# --- W: sliding window -----------------------------------------------------------------------------------------------

def window_mask(H, W, r, device):
    """(N, N) bool: cell j is at most r rows and r columns away from cell i."""
    rows, columns = torch.arange(H, device=device), torch.arange(W, device=device)
    y, x = rows.repeat_interleave(W), columns.repeat(H)                               # (N,) each
    return ((y[:, None] - y).abs() <= r) & ((x[:, None] - x).abs() <= r)


def num_tiles(n):
    """How many tiles cover n cells. (Not -(-n // TILE): ONNX divides negative integers towards zero.)"""
    return (n + TILE - 1) // TILE


def to_tiles(t, H, W, r=0):
    """(B, heads, N, d) -> (tiles, B * heads, (TILE + 2r)^2, d): every tile and r cells around it, 0 beyond the edge."""
    t = t.flatten(0, 1).unflatten(1, (H, W))
    t = F.pad(t, (0, 0, r, r + num_tiles(W) * TILE - W, r, r + num_tiles(H) * TILE - H))
    t = t.unfold(1, TILE + 2 * r, TILE).unfold(2, TILE + 2 * r, TILE)                 # (B * heads, rows, cols, d, n, n)
    return t.permute(1, 2, 0, 4, 5, 3).flatten(3, 4).flatten(0, 1)


def from_tiles(t, B, H, W):
    """The way back: (tiles, B * heads, TILE^2, d) -> (B, heads, N, d), without the padding."""
    t = t.unflatten(2, (TILE, TILE)).unflatten(0, (num_tiles(H), num_tiles(W)))       # (rows, cols, B * heads, 8, 8, d)
    t = t.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)                       # (B * heads, 8 rows, 8 cols, d)
    return t[:, :H, :W].flatten(1, 2).unflatten(0, (B, -1))


def window_attention(q, k, v, H, W, r):
    """
    Sliding window attention by tiles: a tile's 64 queries share one matrix product with the (8 + 2r)^2 keys that any of
    them may see, and a mask cuts out each one's own window. So no tile has a border. Returns (tiles, B * heads, 64, d).
    k and v may hold T tokens more than q at their end, which every query sees.
    """
    N = H * W
    cells, halo = torch.arange(TILE, device=q.device), torch.arange(-r, TILE + r, device=q.device)
    near = (cells[:, None] - halo).abs() <= r                                         # (8, 8 + 2r) along one axis
    near = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)                # (64, (8 + 2r)^2)
    inside = to_tiles(q.new_ones(1, 1, N, 1), H, W).squeeze(1) > 0                    # (tiles, 64, 1) is the query one?
    exists = to_tiles(q.new_ones(1, 1, N, 1), H, W, r).transpose(2, 3).squeeze(1) > 0                # (tiles, 1, n)
    mask = near & exists | ~inside                  # a padded query sees all: over nothing, a softmax may be NaN
    key, value = to_tiles(k[:, :, :N], H, W, r), to_tiles(v[:, :, :N], H, W, r)       # (tiles, B * heads, n, d)
    if k.shape[2] > N:
        key, value = (torch.cat((t, m[:, :, N:].flatten(0, 1).expand(len(t), -1, -1, -1)), 2)
                      for t, m in ((key, k), (value, v)))
        mask = torch.cat((mask, mask.new_ones(1, 1, 1).expand(*mask.shape[:2], k.shape[2] - N)), 2)
    return F.scaled_dot_product_attention(to_tiles(q, H, W), key, value, mask[:, None])


class SlidingWindow(nn.Module):
    """
    Every token attends to the (2r + 1)^2 cells around it, fewer at the edge, and to memory.

    FLOPs per token: 8c^2 + 4(8 + 2r)^2 c, that is 1024c with r = 4, of which (9 / 16)^2 = 32 % pass the mask.
    """

    def __init__(self, c, cfg):
        super().__init__()
        self.proj = Projections(c, cfg.heads, cfg.pos)

    def forward_reference(self, x, memory=None):
        q, k, v = self.proj(x, memory)
        mask = F.pad(window_mask(*x.shape[2:], RADIUS, x.device), (0, k.shape[2] - q.shape[2]), value=True)
        return self.proj.join(masked_attention(q, k, v, mask), x)

    def forward(self, x, memory=None):
        B, C, H, W = x.shape
        q, k, v = self.proj(x, memory)
        with autocast_off(x):
            y = from_tiles(window_attention(q, k, v, H, W, RADIUS), B, H, W)          # (B, heads, N, d)
        return self.proj.join(y, x)


# --- L: latent -------------------------------------------------------------------------------------------------------

class LatentAttention(nn.Module):
    """
    Multi-head latent attention: keys and values are linear maps of one latent of r = c / 4 channels per token.

    As defined: 5.5c^2 + 4Nc FLOPs per token. Its purpose in a language model, a small cache of keys and values, does
    not exist in a detector. What remains: nothing stands between W_q and W_k, nor between W_v and W_out, so their
    products (W_k^T W_q: r x c, W_out W_v: c x r, per head) act instead, and attention runs in the r channels of the
    latent: (0.5 + heads)c^2 + heads N c, plus the two products of weights. A quarter of full attention with one head;
    above 4 heads the definition attends at fewer FLOPs. For this the layer norms act on input and latent (the paper:
    RMSNorm), not on q and k. With pos the latent carries positions to the values too; there is no rotary code.
    """

    def __init__(self, c, cfg):
        super().__init__()
        assert c % cfg.heads == 0, f'{c} channels do not divide into {cfg.heads} heads'
        self.heads, self.pos, r = cfg.heads, cfg.pos, max(1, c // 4)
        self.q_proj = nn.Linear(c, c, bias=False)
        self.down_proj = nn.Linear(c, r, bias=False)
        self.k_proj = nn.Linear(r, c, bias=False)
        self.v_proj = nn.Linear(r, c, bias=False)
        self.out_proj = nn.Linear(c, c, bias=False)
        self.norm, self.latent_norm = nn.LayerNorm(c), nn.LayerNorm(r)

    def latent(self, x, memory):
        """-> what the queries see (B, N, C), and the latent (B, N + T, r), both layer-normed and float32 at least."""
        B, C, H, W = x.shape
        t = tokens(x)
        t = t + sincos_2d(H, W, C, x.device).to(t.dtype) if self.pos else t           # (B, N, C)
        latent = self.down_proj(t if memory is None else torch.cat((t, memory), 1))   # (B, N + T, r)
        wide = torch.promote_types(x.dtype, torch.float32)
        with autocast_off(x):
            return layer_norm(self.norm, t.to(wide)), layer_norm(self.latent_norm, latent.to(wide))

    def forward_reference(self, x, memory=None):
        t, latent = self.latent(x, memory)
        q, k, v = (m.unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for m in (self.q_proj(t), self.k_proj(latent), self.v_proj(latent)))
        y = self.out_proj(masked_attention(q, k, v).transpose(1, 2).flatten(2))       # (B, N, C)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x, memory=None):
        C, d = x.shape[1], x.shape[1] // self.heads
        t, latent = self.latent(x, memory)                                            # (B, N, C), (B, N + T, r)
        with autocast_off(x):                                                         # products of weights in float32
            q, k, v = (p.weight.to(t.dtype).unflatten(0, (self.heads, d))             # (heads, d, C or r)
                       for p in (self.q_proj, self.k_proj, self.v_proj))
            out = self.out_proj.weight.to(t.dtype).unflatten(1, (self.heads, d)).transpose(0, 1)     # (heads, C, d)
            q_weight = (k.transpose(1, 2) @ q).flatten(0, 1)                          # (heads * r, C)
            out_weight = (out @ v).transpose(0, 1).flatten(1)                         # (C, heads * r)
        q = F.linear(t.to(x.dtype), q_weight.to(x.dtype)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        with autocast_off(x):
            key = latent[:, None].expand(-1, self.heads, -1, -1)                      # (B, heads, N + T, r)
            y = F.scaled_dot_product_attention(q.to(t.dtype), key, key, scale=d ** -0.5).transpose(1, 2).flatten(2)
        y = F.linear(y.to(x.dtype), out_weight.to(x.dtype))                           # (B, N, C)
        return y.transpose(1, 2).reshape(x.shape[0], C, *x.shape[2:])


# --- N: native sparse ------------------------------------------------------------------------------------------------

class NativeSparse(nn.Module):
    """
    Three views of the map, each weighed by a gate that the query's token computes (a sigmoid each):

        1  compressed   the mean key and value of every 8x8 tile (and memory): everything, coarsely
        2  chosen       all tokens of the 4 tiles that a tile's queries gave the most attention in 1: some, exactly
        3  window       the 9x9 cells around the query, as in W

    Tiles are routed as a whole, so that 64 queries gather one set of keys. Nothing is causal here. Unlike the paper's,
    compression is a plain mean, and the views share keys and values. The choice itself has no gradient; 1 trains it.

    FLOPs per token: 8c^2 + 6c + 4c(N / 64 + 4 * 64 + 16^2). Full attention costs less below 520 tokens: for P3 and P4.
    """

    def __init__(self, c, cfg):
        super().__init__()
        self.proj = Projections(c, cfg.heads, cfg.pos)
        self.branch_gate = nn.Linear(c, 3)

    def forward_reference(self, x, memory=None):
        B, C, H, W = x.shape
        N = H * W
        q, k, v = self.proj(x, memory)                                                # (B, heads, N (+ T), d)
        rows, columns = (torch.arange(n, device=x.device) // TILE for n in (H, W))
        tile = (rows[:, None] * num_tiles(W) + columns).flatten()                    # (N,) the tile that a cell lies in
        member = F.one_hot(tile).to(q.dtype)                                          # (N, tiles)
        mean = (member / member.sum(0)).T                                             # (tiles, N)
        key, value = (torch.cat((mean @ t[:, :, :N], t[:, :, N:]), 2) for t in (k, v))
        weights = (q @ key.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)      # (B, heads, N, tiles + T)
        score = torch.einsum('bhnj,ni->bij', weights[..., :member.shape[1]], member)  # (B, tiles of queries, of keys)
        chosen = stable_topk(score.flatten(0, 1).float(), min(NUM_CHOSEN, score.shape[2])).unflatten(0, (B, -1))
        pick = torch.zeros_like(score, dtype=torch.bool).scatter(2, chosen, True)     # (B, tiles, tiles)
        k, v = k[:, :, :N], v[:, :, :N]
        views = (weights @ value, masked_attention(q, k, v, pick[:, tile][:, None, :, tile]),
                 masked_attention(q, k, v, window_mask(H, W, RADIUS, x.device)))
        gates = self.branch_gate(tokens(x)).sigmoid().to(q.dtype)[:, None]            # (B, 1, N, 3)
        return self.proj.join(sum(gates[..., i:i + 1] * view for i, view in enumerate(views)), x)

    def forward(self, x, memory=None):
        B, C, H, W = x.shape
        N = H * W
        q, k, v = self.proj(x, memory)                                                # (B, heads, N (+ T), d)
        heads, d = q.shape[1], q.shape[3]
        gates = self.branch_gate(tokens(x)).sigmoid().to(q.dtype)                     # (B, N, 3)
        with autocast_off(x):
            inside = to_tiles(q.new_ones(1, 1, N, 1), H, W)                           # (tiles, 1, 64, 1), 0 is padding
            query, key, value = (to_tiles(t[:, :, :N], H, W) for t in (q, k, v))      # (tiles, B * heads, 64, d)
            # 1) compressed. Its weights are small, N x tiles, and 2) needs them
            coarse_k, coarse_v = (torch.cat(((t.sum(2) / inside.sum(2)).transpose(0, 1), m[:, :, N:].flatten(0, 1)), 1)
                                  for t, m in ((key, k), (value, v)))                 # (B * heads, tiles + T, d)
            weights = (query @ coarse_k.transpose(1, 2) / math.sqrt(d)).softmax(-1)   # (tiles, B * heads, 64, ...)
            compressed = weights @ coarse_v                                           # (tiles, B * heads, 64, d)
            # 2) chosen, for all heads of a tile together. (Padded queries are 0, their weights equal: no say in this)
            tiles = inside.shape[0]
            score = weights[..., :tiles].sum(2).unflatten(1, (B, heads)).sum(2)       # (tiles, B, tiles)
            count = torch.sym_min(NUM_CHOSEN, tiles)
            chosen = stable_topk(score.flatten(0, 1).float(), count).unflatten(0, (tiles, B))        # (tiles, B, count)
            image = torch.arange(B, device=x.device)[:, None]
            some_k, some_v = (t.unflatten(1, (B, heads))[chosen, image].transpose(2, 3).flatten(3, 4).flatten(0, 1)
                              for t in (key, value))                                  # (tiles * B, heads, n, d)
            exists = (inside.flatten(1)[chosen] > 0).flatten(2).flatten(0, 1)         # (tiles * B, n), n = count * 64
            some_q = query.unflatten(1, (B, heads)).flatten(0, 1)                     # (tiles * B, heads, 64, d)
            exact = F.scaled_dot_product_attention(some_q, some_k, some_v, exists[:, None, None])
            exact = exact.unflatten(0, (tiles, B)).flatten(1, 2)                      # (tiles, B * heads, 64, d)
            # 3) window, and the sum
            window = window_attention(q, k[:, :, :N], v[:, :, :N], H, W, RADIUS)
            g = to_tiles(gates[:, None].expand(-1, heads, -1, -1), H, W)              # (tiles, B * heads, 64, 3)
            y = from_tiles(g[..., :1] * compressed + g[..., 1:2] * exact + g[..., 2:] * window, B, H, W)
        return self.proj.join(y, x)


# --- K: kernel density -----------------------------------------------------------------------------------------------

class KernelDensity(nn.Module):
    """
    Kernel regression: y_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j). A Gaussian kernel of layer-normed q and k would
    be softmax attention; these two are other methods.

    epanechnikov  K = max(0, 1 - |q - k|^2 / h^2): beyond the bandwidth h a token weighs exactly 0. h^2 = 2d is the
                  squared distance of two unrelated tokens, so about half are near at the start; the layer norm's
                  weight, a scale per channel, learns the bandwidth. A null neighbour of weight 0.01 makes y fade to 0
                  where nobody is near. Sparse are the weights, not the arithmetic: 8c^2 + 4Nc FLOPs per token. The
                  fast path holds 512 rows of weights at a time, in the backward pass too, instead of N x N.
    linear        K = f(q) f(k), f = elu + 1: the sums over j come first. 8c^2 + 4cd, no N; diffuse.
    """

    def __init__(self, c, cfg):
        super().__init__()
        self.kernel = cfg.kernel
        self.proj = Projections(c, cfg.heads, cfg.pos)

    def forward_reference(self, x, memory=None):
        q, k, v = self.proj(x, memory)
        if self.kernel == 'linear':
            weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3)                 # (B, heads, N, N + T)
            return self.proj.join(weights / weights.sum(3, keepdim=True) @ v, x)
        distance = (q[:, :, :, None] - k[:, :, None]).square().sum(4)                 # (B, heads, N, N + T) squared
        weights = (1 - distance / (2 * q.shape[3])).clamp(min=0)
        return self.proj.join(weights / (weights.sum(3, keepdim=True) + 0.01) @ v, x)

    @staticmethod
    def epanechnikov(q, k, v):
        """q (B, heads, n, d), k and v (B, heads, m, d) -> (B, heads, n, d), by |q - k|^2 = |q|^2 + |k|^2 - 2qk"""
        d = q.shape[3]
        offset = 1 - q.square().sum(3, keepdim=True) / (2 * d) - k.square().sum(3)[:, :, None] / (2 * d)
        weights = F.relu(offset + (q / d) @ k.transpose(2, 3))                        # (B, heads, n, m)
        return weights @ v / (weights.sum(3, keepdim=True) + 0.01)

    def forward(self, x, memory=None):
        q, k, v = self.proj(x, memory)
        with autocast_off(x):
            if self.kernel == 'linear':
                q, k = F.elu(q) + 1, F.elu(k) + 1
                y = q @ (k.transpose(2, 3) @ v) / (q * k.sum(2, keepdim=True)).sum(3, keepdim=True)
            elif torch.compiler.is_exporting():                                       # one piece: N may be a symbol
                y = self.epanechnikov(q, k, v)
            else:
                y = torch.cat([checkpoint(self.epanechnikov, rows, k, v, use_reentrant=False)
                               for rows in q.split(512, 2)], 2)                       # (B, heads, N, d)
        return self.proj.join(y, x)


# --- M: Fourier mixing -----------------------------------------------------------------------------------------------

class FourierMixing(nn.Module):
    """
    The real part of the orthonormal discrete Fourier transform over rows, columns and channels: no weights, no queries.
    What arrives at a cell is one frequency of the whole map. FNet's input is layer-normed, and so is this (without
    weights): frequency 0 of a raw map is sqrt(NC) times its mean, which fp16 cannot hold; of a normed one no frequency
    exceeds its norm, sqrt(NC), 5,800 at P3 of 4K with 256 channels.

    FLOPs per token: about 5c log2(Nc), in float32 under autocast.
    """

    def __init__(self, c, cfg):
        super().__init__()

    def standard(self, x, memory):
        """What a transform cannot do: see memory. Attention without weights, q = k = v."""
        print_once('attn M has no queries that could see memory: it uses standard attention (without weights) instead')
        q = F.layer_norm(tokens(x), x.shape[1:2])[:, None]                            # (B, 1, N, C)
        k = torch.cat((q, F.layer_norm(memory.to(x.dtype), x.shape[1:2])[:, None]), 2)                # (B, 1, N + T, C)
        return q, k, k

    def forward_reference(self, x, memory=None):
        if memory is not None:
            return masked_attention(*self.standard(x, memory))[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        dft = [torch.exp(-2j * math.pi / n * torch.outer(i, i)) / math.sqrt(n)
               for n in x.shape[1:] for i in [torch.arange(n, dtype=x.dtype, device=x.device)]]
        t = F.layer_norm(tokens(x), x.shape[1:2]).to(dft[0].dtype)                    # (B, N, C)
        return (torch.kron(dft[1], dft[2]) @ t @ dft[0]).real.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x, memory=None):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with autocast_off(x):
            if memory is not None:
                y = F.scaled_dot_product_attention(*self.standard(wide, memory))[:, 0]                # (B, N, C)
                return y.to(x.dtype).transpose(1, 2).unflatten(2, x.shape[2:])
            t = F.layer_norm(wide.movedim(1, 3), x.shape[1:2])                        # (B, H, W, C)
            return torch.fft.fftn(t, dim=(1, 2, 3), norm='ortho').real.movedim(3, 1).to(x.dtype)


# --- T: tokens only --------------------------------------------------------------------------------------------------

class TokensOnly(SparseGlobalBlock):
    """
    S without its dense path: y is out(A v) at the selected tokens and 0 elsewhere. Selection, weights and settings are
    S's; a learned score scales what its token receives. fuse is not for this one.

    FLOPs: 8kc^2 + 4k^2 c, whatever the image size: 1.6 G at P4 of 1080p (S: 5.4 G). The selection reads the map once.
    """

    def __init__(self, c, cfg):
        super().__init__(c, cfg.k, cfg.select, cfg.heads, cfg.pos, cfg.keep)

    def maps(self, positioned, t, memory=None):
        """Tokens with and without positions (B, n, C) -> q (B, heads, n, d), k and v (B, heads, n + T, d)."""
        q = layer_norm(self.norm, project(positioned, self.q_proj))                   # (B, n, C)
        if memory is not None:                                                        # (B, n + T, C) from here on
            positioned, t = (torch.cat((m, memory.to(t.dtype)), 1) for m in (positioned, t))
        k = layer_norm(self.norm, project(positioned, self.k_proj))
        return self.split(q), self.split(k), self.split(project(t, self.v_proj))

    def finish(self, t, y):
        """What the heads gathered for tokens t (B, n, C) -> what is added to them."""
        return project(y, self.out_proj)

    def forward_reference(self, x, memory=None, memory_mask=None, chosen=None):
        B, C, H, W = x.shape
        t = tokens(x)                                                                 # (B, N, C)
        q, k, v = self.maps(t + sincos_2d(H, W, C, x.device).to(t.dtype) if self.pos else t, t, memory)
        selected, s, kept = self.select_tokens(x) if chosen is None else chosen
        kept = torch.ones_like(selected, dtype=torch.bool) if kept is None else kept
        attends = torch.zeros(B, H * W, dtype=torch.bool, device=x.device).scatter(1, selected, kept)
        mask = self.key_mask(H * W, k.shape[2] - H * W, attends, memory_mask)         # (B, 1, 1, N + T)
        y = masked_attention(q, k, v, mask).transpose(1, 2).flatten(2)                # (B, N, C)
        y = self.finish(t, y) * attends[..., None]
        if s is not None:
            y = y * torch.zeros(B, H * W, dtype=s.dtype, device=s.device).scatter(1, selected, s.sigmoid())[..., None]
        return y.transpose(1, 2).unflatten(2, (H, W))

    def forward(self, x, memory=None, memory_mask=None, chosen=None):
        B, C, H, W = x.shape
        selected, s, kept = self.select_tokens(x) if chosen is None else chosen       # (B, k) each
        rows = selected[..., None].expand(-1, -1, C)                                  # (B, k, C)
        with autocast_off(x):
            t = tokens(x).gather(1, rows).to(torch.promote_types(x.dtype, torch.float32))            # (B, k, C)
            q, k, v = self.maps(t + sincos_2d(H, W, C, x.device).to(t.dtype)[selected] if self.pos else t, t, memory)
            mask = self.key_mask(t.shape[1], k.shape[2] - t.shape[1], kept, memory_mask)
            y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            y = self.finish(t, y)                                                     # (B, k, C)
            if s is not None:
                y = y * s.sigmoid()[..., None]
            if kept is not None:
                y = y * kept[..., None]
        y = x.new_zeros(B, H * W, C).scatter_(1, rows, y.to(x.dtype))                 # (B, N, C)
        return y.transpose(1, 2).unflatten(2, (H, W))


# --- P: a whole layer, on the selected tokens ------------------------------------------------------------------------

class PublishedLayer(TokensOnly):
    """
    T with what published attention blocks have besides attention: heads of 32 channels, a 7x7 depthwise convolution
    that tells each cell its surroundings, thus its position, a feed-forward layer of twice the width, and residuals.
    The last maps of all three start at zero, so that the block starts as the identity and needs no gate.

    FLOPs: 16kc^2 + 4k^2 c for the tokens, 98 N c for the convolution.
    """

    def __init__(self, c, cfg):
        super().__init__(c, cfg)
        self.heads = c // 32 if cfg.heads == 1 and c % 32 == 0 else cfg.heads
        self.place = nn.Conv2d(c, c, 7, padding=3, groups=c, bias=False)
        self.norm_mlp = nn.LayerNorm(c)
        self.mlp_in, self.mlp_out = nn.Conv2d(c, 2 * c, 1, bias=False), nn.Conv2d(2 * c, c, 1, bias=False)
        for last in (self.place, self.out_proj, self.mlp_out):
            nn.init.zeros_(last.weight)

    def finish(self, t, y):
        y = super().finish(t, y)
        return y + project(F.gelu(project(layer_norm(self.norm_mlp, t + y), self.mlp_in)), self.mlp_out)

    def run(self, path, x, memory, memory_mask, chosen):
        chosen = self.select_tokens(x) if chosen is None else chosen
        place = self.place(x)                                                         # (B, C, H, W)
        return place + path(x + place, memory, memory_mask, chosen)

    def forward_reference(self, x, memory=None, memory_mask=None, chosen=None):
        return self.run(super().forward_reference, x, memory, memory_mask, chosen)

    def forward(self, x, memory=None, memory_mask=None, chosen=None):
        return self.run(super().forward, x, memory, memory_mask, chosen)

    def attention(self, x, memory=None, memory_mask=None, chosen=None):
        chosen = self.select_tokens(x) if chosen is None else chosen
        x = x.to(self.place.weight.dtype)                                             # x may come from under autocast
        return super().attention(x + self.place(x), memory, memory_mask, chosen)


# --- C: convolutions -------------------------------------------------------------------------------------------------

class ConvolutionControl(nn.Module):
    """
    What else the parameters of S could be: one more bottleneck of two 3x3 convolutions, through 2c / 9 channels. It has
    S's 4c^2 parameters and 8c^2 FLOPs per token, more than S, so a gain of S over C is due to attention, not to size.
    """

    def __init__(self, c):
        super().__init__()
        narrow = max(1, round(2 * c / 9))
        self.down = nn.Conv2d(c, narrow, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(narrow, eps=1e-3, momentum=0.03)
        self.up = nn.Conv2d(narrow, c, 3, padding=1, bias=False)

    def forward(self, x, memory=None):
        """x (B, C, H, W) -> (B, C, H, W). A convolution cannot look at memory, and does not."""
        return self.up(F.silu(self.norm(self.down(x))))


# --- the gate, and all letters ---------------------------------------------------------------------------------------

class Gated(nn.Module):
    """
    y = x + gate * mixer(x, memory, ...). gate: see make_gate.

    The product is taken in float32: the gate's gradient is a sum over B C H W terms, which fp16 cannot hold. Weight
    decay must leave the gate alone.
    """

    def __init__(self, mixer, gate='learned'):
        super().__init__()
        self.mixer = mixer
        self.gate = make_gate(gate)

    def forward(self, x, memory=None, *more):
        y = self.mixer(x, memory, *more)
        return x + (self.gate * y.to(torch.promote_types(y.dtype, torch.float32))).to(x.dtype)

    def fuse(self):
        """The inference form, as every block has one: here it is the training form."""
        return self


ATTENTION = {'W': SlidingWindow, 'L': LatentAttention, 'N': NativeSparse, 'K': KernelDensity, 'M': FourierMixing,
             'T': TokensOnly, 'P': PublishedLayer}


def make_block(letter, c, cfg):
    """The gated block of a letter of `attn`, for c channels; None for '-'."""
    if letter not in HELP:
        known = '\n'.join(f'  {key}  {text}' for key, text in HELP.items())
        raise InputError(f'attn has no letter {letter!r}, choose among\n{known}')
    if letter in ATTENTION:
        return Gated(ATTENTION[letter](c, cfg), 'none' if letter == 'P' else cfg.gate)
    if letter == 'C':
        return Gated(ConvolutionControl(c), cfg.gate)
    if letter == '-':
        return None
    k, select = {'S': (cfg.k, cfg.select), 'F': (0, 'l2sq'), 'D': (0, 'none')}[letter]
    return SparseGlobalBlockGated(c, k, select, cfg.heads, cfg.pos, cfg.gate, cfg.keep if letter == 'S' else '')


def selecting(block):
    """The part of a block that selects tokens, a SparseGlobalBlock (S, F, T, P); None where none does."""
    mixer = block.mixer if isinstance(block, Gated) else block
    return mixer if isinstance(mixer, SparseGlobalBlock) and mixer.select != 'none' else None

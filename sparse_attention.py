"""
The sparse global block: the k most salient tokens of a feature map see each other, all others keep to themselves.

A convolution sees its neighbourhood. Full self-attention over the N = H*W tokens of a map sees everything, at a cost of
O(N^2 c). This block lets only k << N tokens attend to each other, O(k^2 c), puts what they learned back onto the grid,
and adds it to its input through a gate that starts at 0, so that a pretrained network is undisturbed at step 0.

    1  select   importance = |x_n|^2 for every token n; keep the k largest
    2  attend   q, k, v = three linear maps of x; A = softmax(LN(q) LN(k)^T / sqrt(c)) among the selected tokens
    3  scatter  start from v everywhere, overwrite the selected tokens with A v, apply one more linear map `out`
    4  gate     y = x + gate * block(x)

`forward_reference` is that text in code: read it first, and trust the rest because tests/test_sparse_attention.py
holds it equal.

What it costs. The attention products take 4 k^2 c FLOPs, which does not grow with the image. The four maps of the
definition take 8 N c^2, which does: at P4 of a 1080p image (N = 8,160, c = 512) 17.1 GFLOPs of projections stand
beside 0.5 of attention. "O(k^2 c)" forgets them. Four facts take away two thirds of that without changing a result:

    q and k are needed for the selected tokens only:                       4 N c^2  ->  4 k c^2
    `out` follows v with nothing in between on unselected tokens:          one map, W_out W_v, instead of two
    `out` commutes with A, because A mixes tokens and W_out channels:      out(A v) = A (out v), so the selected tokens
                                                                           reuse that same dense map
    and the gate is a factor of that map's weight (c^2 products) instead of one on the map's output (N c of them)

What is left is 2 N c^2 (+ 2 c^3 in training, for the product of the weights) + 4 k c^2 + 4 k^2 c. One dense map is the
floor: the definition gives every token, selected or not, its own out(v). What that map alone is worth is the question
a critic must ask, and select='none' (the letter D in the model's `attn` string) is the control that answers it.

The selected tokens may attend to T tokens from elsewhere too (memory: another level, earlier frames, see HSVDET). This
adds 4 T c^2 + 4 k T c: at P4 of 1080p, scale l, 25 % of the block for T = 512 and 6 % for T = 128 (with the map between
the levels: python model.py --memory=scale, and --k=0,512,128), of the network 0.16 % and 0.04 %.

k is a count, and a picture of two objects fills it as one of two hundred does. keep='mass:0.5' keeps of the k only the
tokens that hold half of the importance (top-p, as in sampling from a language model). The rest is masked, so shapes and
FLOPs stay those of k; what changes is who attends to whom.

Top-k passes no gradient to the importance. So squared-norm selection does not learn *what to select*: norms change only
as a side effect, because attention among the selected tokens trains the features. select='learned' has a gradient path:
a score s = w x + b picks the tokens, and sigmoid(s) scales the change that attention makes to them. Norm and squared
norm order tokens identically, so select='l2' and 'l2sq' are one method (unless `keep` compares sums of them).

What the design's arguments do and do not show. *Entropy*: a softmax over k tokens holds at most log k nats instead of
log N, so less of its mass goes to clutter; that bounds how diffuse attention can be, not whether the right tokens were
kept. *Saliency*: a large norm is energy after BatchNorm and SiLU, where background is mostly near zero; that is a habit
of trained CNNs and no theorem, so look at it (detect.py --tokens) and compare with random tokens. *Gradient*: at gate 0
dL/dgate = <dL/dy, block(x)>, and every weight of the block has a gradient proportional to the gate, so learning starts
slowly but cannot disturb. *The gate's value*: only gate * W_out acts, and doubling one while halving the other changes
nothing; a gate that "grew to 0.7" is therefore no measure of how much the block matters. Take the block out and count.

Papers: attention, Vaswani et al. 2017 (1706.03762); query-key normalisation, Henry et al. 2020 (2010.04245);
zero-initialised gates, Bachlechner et al. 2020 (2003.04887); keeping salient tokens in detection, Sparse DETR, Roh et
al. 2021 (2111.14330); router scores that scale the update, Mixture-of-Depths, Raposo et al. 2024 (2404.02258).
"""
import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def autocast_off(x):
    """Inside, autocast changes nothing, whatever surrounds it. (Meta tensors have no autocast.)"""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def sincos_2d(H, W, c, device):
    """Sine-cosine encodings of all cells, (H*W, c): a quarter of the channels each for sin y, cos y, sin x, cos x."""
    assert c % 4 == 0, f'the positional encoding needs channels in fours, got {c}'
    omega = torch.exp(torch.arange(c // 4, device=device) * (-math.log(10000.0) / (c // 4)))
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing='ij')
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega                         # (N, c/4) each
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), 1)                         # (N, c)


def layer_norm(norm, t):
    """nn.LayerNorm in the precision of t, whatever that of its weights (fp16 after model.half())."""
    return F.layer_norm(t, t.shape[-1:], norm.weight.to(t.dtype), norm.bias.to(t.dtype), norm.eps)


def make_gate(gate):
    """The gate's parameter. 'learned': trained, starts at 0; 'fixed': 0.5; 'none': 1, a plain residual connection."""
    start = {'learned': 0.0, 'fixed': 0.5, 'none': 1.0}[gate]
    return nn.Parameter(torch.tensor(start), requires_grad=gate == 'learned')


def project(tokens, conv):
    """A 1x1 convolution on tokens (B, n, C), in their dtype."""
    return F.linear(tokens, conv.weight.flatten(1).to(tokens.dtype))


def stable_topk(importance, k, sorted=False):
    """
    Indices (B, k) of the k largest of importance (B, N) float32; of equals the one with the lower index wins. sorted:
    the largest first.

    torch.topk leaves open which of two equal values it returns. A float's bits, read as an integer, order like the
    float itself (for negative ones after flipping the rest of the bits), so bits and position together make one
    integer key without ties.
    """
    if torch.compiler.is_exporting():
        return importance.topk(k, dim=1, sorted=sorted).indices                       # ONNX defines ties just so
    B, N = importance.shape
    bits = importance.contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7fffffff, bits).long()
    key = (bits << 32) + torch.arange(N - 1, -1, -1, device=importance.device)
    return key.topk(k, dim=1, sorted=sorted).indices


class Selection(NamedTuple):
    """What select_tokens chose of B maps."""
    cells: torch.Tensor                                                               # (B, k) row-major indices
    scores: torch.Tensor | None                                                       # (B, k), if they are learned
    kept: torch.Tensor | None                                                         # (B, k) bool; None: all of them


class SparseGlobalBlock(nn.Module):
    """
    (B, C, H, W) -> (B, C, H, W): steps 1 to 3 above, without the gate.

    c       channels
    k       tokens that attend: a count (never more than N are taken), a fraction of N if below 1, or 0 for all of them
    select  'l2sq' | 'l2' | 'random' | 'learned' | 'none' (nobody attends: the dense path alone)
    heads   attention heads; the design has one
    pos     add sine-cosine positions to what q and k see; the design has none, the grid and the CNN carry position
    keep    '': all k attend | 'mass:0.5': of the k only as many, the most important first, as hold half of the
            importance of the whole map (all k, if they do not reach it); the rest is treated as not selected. Each
            image for itself, by a mask: shapes and cost stay those of k. The importance is |x|^2 ('l2sq'), |x| ('l2')
            or sigmoid(s) ('learned'), so that here l2 and l2sq are two methods
    """

    def __init__(self, c, k=512, select='l2sq', heads=1, pos=False, keep=''):
        super().__init__()
        assert select in ('l2sq', 'l2', 'random', 'learned', 'none'), f'unknown selection {select!r}'
        assert c % heads == 0, f'{c} channels do not divide into {heads} heads'
        self.k, self.select, self.heads, self.pos = k, select, heads, pos
        self.mass = float(keep.removeprefix('mass:')) if keep.startswith('mass:') else 0.0
        assert not self.mass or select in ('l2sq', 'l2', 'learned'), f'no importance to share out in select={select!r}'
        if select != 'none':
            self.q_proj = nn.Conv2d(c, c, 1, bias=False)
            self.k_proj = nn.Conv2d(c, c, 1, bias=False)
            self.norm = nn.LayerNorm(c)
        self.v_proj = nn.Conv2d(c, c, 1, bias=False)
        self.out_proj = nn.Conv2d(c, c, 1, bias=False)
        if select == 'learned':
            self.score = nn.Linear(c, 1)
        self.merged = None                                                            # see fuse()

    # --- 1: select -------------------------------------------------------------------------------------------------

    def num_selected(self, N):
        """How many of N tokens attend. (sym_min, sym_max: N is a symbol in an export with free image sizes.)"""
        if self.k == 0:
            return N
        return torch.sym_max(1, round(self.k * N)) if self.k < 1 else torch.sym_min(self.k, N)

    def importance(self, x):
        """
        x (B, C, H, W) -> (B, N): random numbers, the learned scores with their gradient, or norms.

        In float32 at least: a sum of 512 squares leaves fp16's range (65,504) as soon as activations reach 11.4.
        """
        B, C, H, W = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.select == 'random':                                                # afresh at every training step, but
            if self.training:                                                        # an evaluation must repeat itself
                return torch.rand(B, H * W).to(x.device)
            g = torch.Generator().manual_seed(0)                                  # and not depend on the batch
            return torch.rand(1, H * W, generator=g).expand(B, -1).to(x.device)
        if self.select == 'learned':
            tokens = x.flatten(2).transpose(1, 2).to(wide)                            # (B, N, C)
            return F.linear(tokens, self.score.weight.to(wide), self.score.bias.to(wide))[..., 0]
        norm = torch.linalg.vector_norm(x.detach().flatten(2), dim=1, dtype=wide)     # without a map of squares
        return norm if self.select == 'l2' else norm.square()

    def select_tokens(self, x, count=None):
        """
        x (B, C, H, W) -> Selection of the k most important tokens. Fewer are kept, and marked in `kept`, if count (B,)
        gives the number per image (keep='joint'), or by the share of the importance that they hold (keep='mass:...').
        Then they are sorted, the most important first.
        """
        importance, k = self.importance(x), self.num_selected(x.shape[2] * x.shape[3])
        adaptive = count is not None or self.mass > 0
        selected = stable_topk(importance.detach().float(), k, sorted=adaptive)       # (B, k)
        s = importance.gather(1, selected) if self.select == 'learned' else None      # (B, k)
        if not adaptive:
            return Selection(selected, s, None)
        if count is not None:
            return Selection(selected, s, torch.arange(k, device=x.device) < count[:, None])
        mass = importance.detach().sigmoid() if self.select == 'learned' else importance
        share = mass.gather(1, selected).cumsum(1) / mass.sum(1, keepdim=True)        # (B, k) held up to and with each
        kept = F.pad(share, (1, -1)) < self.mass                                      # those before it are not enough
        return Selection(selected, s, kept)

    # --- 2, 3: the definition ----------------------------------------------------------------------------------------

    @staticmethod
    def key_mask(k, T, kept, memory_mask):
        """Which of k selected tokens and T of memory may be attended to: (B, 1, 1, k + T) bool; None: all."""
        if kept is None and memory_mask is None:
            return None
        there = kept if memory_mask is None else memory_mask
        B = there.shape[0]                                   # len() would be a constant of an exported file
        parts = [there.new_ones(B, n) if mask is None else mask for mask, n in ((kept, k), (memory_mask, T))]
        return torch.cat(parts, 1)[:, None, None]

    def split(self, t):
        """(B, n, C) -> (B, heads, n, C / heads)"""
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def weights(self, q, k, mask=None):
        """q (B, n, C), k (B, m, C) -> attention A (B, heads, n, m), every row summing to 1; mask: see key_mask."""
        q, k = self.split(layer_norm(self.norm, q)), self.split(layer_norm(self.norm, k))  # (B, heads, ., hs)
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(-1)

    def forward_reference(self, x, memory=None, memory_mask=None, chosen=None):
        """The definition, as slow as it reads: four dense maps, then gather, attend, scatter. Arguments: forward's."""
        B, C, H, W = x.shape
        positioned = x + sincos_2d(H, W, C, x.device).to(x.dtype).T.view(C, H, W) if self.pos else x
        v = self.v_proj(x).flatten(2).transpose(1, 2)                                 # (B, N, C)
        if self.select != 'none':
            q = self.q_proj(positioned).flatten(2).transpose(1, 2)                    # (B, N, C)
            k = self.k_proj(positioned).flatten(2).transpose(1, 2)                    # (B, N, C)
            selected, s, kept = self.select_tokens(x) if chosen is None else chosen   # (B, k) each
            index = selected[..., None].expand(-1, -1, C)                             # (B, k, C)
            wide = torch.promote_types(x.dtype, torch.float32)
            with autocast_off(x):
                q, k, v_sel = (t.gather(1, index).to(wide) for t in (q, k, v))        # (B, k, C) each
                v_all = v_sel
                if memory is not None:                                                # (B, k + T, C) from here on
                    k = torch.cat((k, project(memory.to(wide), self.k_proj)), 1)
                    v_all = torch.cat((v_sel, project(memory.to(wide), self.v_proj)), 1)
                mask = self.key_mask(q.shape[1], k.shape[1] - q.shape[1], kept, memory_mask)
                attended = (self.weights(q, k, mask) @ self.split(v_all)).transpose(1, 2).flatten(2)  # (B, k, C)
                if s is not None:
                    attended = v_sel + s.sigmoid()[..., None] * (attended - v_sel)
                if kept is not None:
                    attended = torch.where(kept[..., None], attended, v_sel)
            v = v.scatter(1, index, attended.to(v.dtype))
        return self.out_proj(v.transpose(1, 2).reshape(B, C, H, W))

    # --- 2, 3: the same, for a third -------------------------------------------------------------------------------

    def dense_weight(self):
        """W_out W_v, (C, C, 1, 1): the one map that every token goes through. In float32 also under autocast."""
        if self.merged is not None:
            return self.merged
        with autocast_off(self.v_proj.weight):
            return (self.out_proj.weight.flatten(1) @ self.v_proj.weight.flatten(1))[..., None, None]

    def head_mix(self):
        """The (C, C) weight that follows the heads."""
        return self.out_proj.weight.flatten(1)

    def fuse(self):
        """
        Inference form, from which there is no way back: keep the product of the two dense maps, drop its factors
        (several heads need them apart, and stay as they are).
        """
        if self.heads == 1 and self.merged is None:
            self.merged = nn.Parameter(self.dense_weight().detach(), requires_grad=False)
            del self.v_proj, self.out_proj
        return self

    def forward(self, x, memory=None, memory_mask=None, chosen=None):
        """
        x (B, C, H, W) -> (B, C, H, W). memory (B, T, C): tokens from elsewhere that the selected ones attend to as
        well; memory_mask (B, T) bool: which of them count (None: all). chosen: a Selection made before, or None.
        """
        B, C, H, W = x.shape
        weight = self.dense_weight()
        y = F.conv2d(x, weight)                                                       # (B, C, H, W): out(v) everywhere
        if self.select == 'none':
            return y
        x_tokens = x.flatten(2).transpose(1, 2)                                       # (B, N, C)
        y_tokens = y.view(B, C, H * W).transpose(1, 2)                                # (B, N, C), a view of y
        wide = torch.promote_types(x.dtype, torch.float32)
        # if every token attends there is nothing to gather or scatter; in an export with free sizes N is a symbol, and
        # only k = 0 is known to mean all
        takes_all = self.k == 0 or type(H * W) is int and self.num_selected(H * W) == H * W
        all_selected = takes_all and self.select != 'learned' and not self.mass and chosen is None
        if all_selected:
            x_sel, y_sel, s, kept = x_tokens, y_tokens, None, None
        else:
            selected, s, kept = self.select_tokens(x) if chosen is None else chosen   # (B, k) each
            index = selected[..., None].expand(-1, -1, C)                             # (B, k, C)
            x_sel, y_sel = x_tokens.gather(1, index), y_tokens.gather(1, index)       # (B, k, C)
        with autocast_off(x):
            # contiguous: for strided rows SDPA builds the N x N matrix
            x_sel, y_sel = x_sel.to(wide).contiguous(), y_sel.to(wide).contiguous()
            positioned = x_sel
            if self.pos:
                code = sincos_2d(H, W, C, x.device).to(wide)
                positioned = x_sel + (code if all_selected else code[selected])
            tokens, positioned_all, y_all = x_sel, positioned, y_sel
            if memory is not None:                                                    # (B, k + T, C) from here on
                memory = memory.to(wide)
                tokens, positioned_all = torch.cat((x_sel, memory), 1), torch.cat((positioned, memory), 1)
                y_all = torch.cat((y_sel, F.linear(memory, weight.flatten(1).to(wide))), 1)
            mask = self.key_mask(x_sel.shape[1], tokens.shape[1] - x_sel.shape[1], kept, memory_mask)
            q = self.split(layer_norm(self.norm, project(positioned, self.q_proj)))   # (B, heads, k, hs)
            k = self.split(layer_norm(self.norm, project(positioned_all, self.k_proj)))  # (B, heads, k + T, hs)
            if self.heads == 1:
                attended = F.scaled_dot_product_attention(q, k, y_all[:, None], mask)[:, 0]  # (B, k, C): A (out v)
            else:                           # each head has an A of its own, so `out` comes after them, on k tokens only
                v = self.split(project(tokens, self.v_proj))
                attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
                attended = F.linear(attended, self.head_mix().to(wide))
            if s is not None:
                attended = y_sel + s.sigmoid()[..., None] * (attended - y_sel)
            if kept is not None:
                attended = torch.where(kept[..., None], attended, y_sel)
        if all_selected:
            return attended.to(y.dtype).transpose(1, 2).reshape(B, C, H, W)
        if not torch.is_grad_enabled():                                          # in place: saves a copy of N C numbers
            y_tokens.scatter_(1, index, attended.to(y.dtype))
            return y
        y_tokens = y_tokens.scatter(1, index, attended.to(y.dtype))
        return y_tokens.transpose(1, 2).reshape(B, C, H, W)

    def attention(self, x, memory=None, memory_mask=None, chosen=None):
        """
        For looking at, with forward's arguments: selected (B, k) row-major cell indices and their weights
        (B, heads, k, k + T), on each other and on memory. A row sums to 1; rows and columns of tokens that are not kept
        are 0.
        """
        B, C, H, W = x.shape
        selected, _, kept = self.select_tokens(x) if chosen is None else chosen
        positioned = x.flatten(2).transpose(1, 2).float()                             # (B, N, C)
        if self.pos:
            positioned = positioned + sincos_2d(H, W, C, x.device)
        t = positioned.gather(1, selected[..., None].expand(-1, -1, C))               # (B, k, C)
        keys = t if memory is None else torch.cat((t, memory.float()), 1)             # (B, k + T, C)
        mask = self.key_mask(t.shape[1], keys.shape[1] - t.shape[1], kept, memory_mask)
        weights = self.weights(project(t, self.q_proj), project(keys, self.k_proj), mask)
        return selected, weights if kept is None else weights * kept[:, None, :, None]


class SparseGlobalBlockGated(SparseGlobalBlock):
    """
    y = x + gate * block(x), step 4: what the network uses. At gate 0 it is the identity to the last bit.

    A zero gate hides the block's weights from the gradient for one step; only the gate itself sees one, and then all
    do. Weight decay must leave the gate alone, or it pulls the block shut: see HSVDET.param_groups.
    """

    def __init__(self, c, k=512, select='l2sq', heads=1, pos=False, gate='learned', keep=''):
        super().__init__(c, k, select, heads, pos, keep)
        self.gate = make_gate(gate)

    def forward_reference(self, x, *elsewhere):
        return x + self.gate * super().forward_reference(x, *elsewhere)

    def dense_weight(self):
        """gate W_out W_v. On the weight a gate costs c^2 products and its gradient is a float32 sum over c^2; on the
        output it would cost N c, and an fp16 sum over millions that overflows under loss scaling."""
        return super().dense_weight() if self.merged is not None else self.gate * super().dense_weight()

    def head_mix(self):
        return self.gate * super().head_mix()

    def forward(self, x, *elsewhere):
        y = super().forward(x, *elsewhere)
        if torch.is_grad_enabled() or y.dtype != x.dtype:
            return x + y
        return y.add_(x)                                                         # fresh memory costs more than the sum

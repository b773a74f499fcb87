"""
Which optimizer updates which part of the network (backbone, neck, block, head), and in which precision a part computes.

    make_optimizers(groups, kinds, momentum, beta2)          groups as a detector's param_groups() gives them, by part
    set_precision(model, groups, dtypes, device_type)

AdamW and SGD are torch's. Muon is here because torch.optim.Muon takes matrices only, and computes in bfloat16, which a
CPU without hardware for it emulates ten times slower than float32. LAMB (You et al. 2019, 1904.00962), SOAP (Vyas et
al. 2024, 2409.11321) and Lion (Chen et al. 2023, 2302.06675) come from the package pytorch_optimizer, when asked for;
another of its kind is a row in LIBRARY.

Left out: Sophia, which needs second derivatives, another backward pass; and Schedule-Free, which wants a constant
learning rate instead of our three stages, and BatchNorm statistics of its averaged weights, so that every evaluation
would begin with a pass over training images; tried, it was no better than AdamW (RESULTS.md, "tried").
"""
import torch

from configurator import InputError

LIBRARY = dict(lamb=('Lamb', 0.999), soap=('SOAP', 0.95), lion=('Lion', 0.99))        # its class, its paper's beta2
KINDS = ('adamw', 'sgd', 'muon', *LIBRARY)
PARTS = ('backbone', 'neck', 'block', 'head')                                         # of a network


QUINTIC = 3.4445, -4.7750, 2.0315                      # a x + b x^3 + c x^5 five times makes 0.003..1 about 0.7..1.2


def orthogonalize(x):
    """(k, n, m) -> about U V^T of their singular value decompositions: the quintic Newton-Schulz iteration of Muon."""
    a, b, c = QUINTIC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b g + c g g) x
    return x


def orthogonalize_wide(stacks):
    """
    The same for a list of (k, n, m), of one n and any m. An iteration multiplies x from the left by a symmetric
    p(gram), so the next gram is p gram p, and all five are products of (n, n) matrices: 4 n^2 m + 34 n^3 FLOPs instead
    of 20 n^2 m + 10 n^3; 0.37 of them for a 3x3 kernel (m = 9 n), 1.27 for m = n. And without m all go through at once.
    """
    a, b, c = QUINTIC
    gram = torch.cat([x @ x.mT for x in stacks])
    norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].sqrt() + 1e-7          # Frobenius
    gram, product = gram / norm ** 2, None
    for i in range(5):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if i else factor / norm
        if i < 4:
            gram = factor @ gram @ factor
    return [part @ x for part, x in zip(product.split([len(x) for x in stacks]), stacks, strict=True)]


def orthogonalize_all(matrices):
    """The same for each of a list, with few operations: a GPU waits for Python where it is given hundreds of them."""
    places, wide, done = {}, {}, {}                                     # places: (n, m), n <= m -> indices in the list
    for i, x in enumerate(matrices):
        places.setdefault((min(x.shape), max(x.shape)), []).append(i)
    for (n, m), some in places.items():
        stack = torch.stack([matrices[i] if len(matrices[i]) == n else matrices[i].mT for i in some])
        if m < 2 * n:
            done[n, m] = orthogonalize(stack)
        else:
            wide.setdefault(n, {})[n, m] = stack
    for stacks in wide.values():
        done |= zip(stacks, orthogonalize_wide(list(stacks.values())), strict=True)
    found = {i: x for shape, some in places.items() for i, x in zip(some, done[shape].unbind(), strict=True)}
    return [found[i] if found[i].shape == x.shape else found[i].mT for i, x in enumerate(matrices)]


class Muon(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices and convolution kernels, which count as
    matrices (c_out, c_in h w): the step is the Nesterov momentum with all singular values made equal, its size that of
    an AdamW step (0.2 sqrt(larger side), Liu et al. 2025, 2502.16982), so that lr and weight decay mean the same.
    """

    def __init__(self, groups, momentum):
        super().__init__(groups, dict(momentum=momentum))

    @torch.no_grad()
    def step(self):
        groups, directions = [], []
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            gradients, buffers = [p.grad for p in params], [self.state[p]['momentum_buffer'] for p in params]
            if params:
                torch._foreach_lerp_(buffers, gradients, 1 - group['momentum'])
                directions += torch._foreach_lerp(gradients, buffers, group['momentum'])             # Nesterov's
                groups.append((group, params))
        updates = iter(orthogonalize_all([x.flatten(1) for x in directions]))
        for group, params in groups:
            mine = [next(updates).reshape(p.shape) for p in params]
            torch._foreach_mul_(mine, [-group['lr'] * 0.2 * max(len(p), p[0].numel()) ** 0.5 for p in params])
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(params, mine)


def from_library(kind, groups, momentum):
    """An optimizer of LIBRARY. Raises InputError where the package is missing."""
    try:
        import pytorch_optimizer
    except ImportError:
        raise InputError(f'optimizer {kind} needs a package that is not installed: pip install pytorch_optimizer'
                         ) from None
    name, beta2 = LIBRARY[kind]
    return getattr(pytorch_optimizer, name)(groups, betas=(momentum, beta2))


def make_optimizers(groups, kinds, momentum, beta2):
    """
    groups have their own lr, a group's 'factor' is its share of the run's. kinds: dict part -> one of KINDS. Only AdamW
    and SGD update vectors and scalars; with the other kinds AdamW does. momentum: of SGD (Nesterov) and Muon, the first
    beta of all others; beta2: of AdamW. One optimizer per kind.
    """
    make = dict(adamw=lambda some: torch.optim.AdamW(some, betas=(momentum, beta2), fused=True),
                sgd=lambda some: torch.optim.SGD(some, momentum=momentum, nesterov=momentum > 0),
                muon=lambda some: Muon(some, momentum))
    by_kind = {}
    for group in groups:
        kind = kinds[group['part']]
        if kind not in ('adamw', 'sgd') and group['name'].endswith('no_decay'):       # vectors and scalars
            kind = 'adamw'
        by_kind.setdefault(kind, []).append(dict(group, factor=group['lr']))
    return [make[kind](some) if kind in make else from_library(kind, some, momentum)
            for kind, some in by_kind.items()]


def fastest_dtype(device):
    """What dtype='auto' stands for: the fastest that is not emulated. bf16 without hardware for it is slow."""
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'bfloat16' if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else 'float32'


def set_precision(model, groups, dtypes, device_type):
    """
    Run the modules of each part in its own precision, whatever autocast is active outside. dtypes: dict part ->
    'float32', 'bfloat16' or 'float16'; other parts, and parameters that are in none of `groups`, follow the outer
    autocast. A module belongs to a part if all its parameters do. Operations outside such modules (upsampling,
    concatenation, losses) keep the dtype of their inputs.
    """
    part_of = {id(p): group['part'] for group in groups for p in group['params']}

    def widen(x):
        if type(x) in (list, tuple):                                          # several maps
            return type(x)(map(widen, x))
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def in_precision(forward, dtype):
        def run(*inputs):
            if dtype == 'float32':
                inputs = widen(inputs)
            with torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32'):
                return forward(*inputs)
        return run

    for module in model.children():
        parts = {part_of[id(p)] for p in module.parameters() if id(p) in part_of}
        if len(parts) > 1 or isinstance(module, torch.nn.ModuleList):        # a list is not called, its modules are
            set_precision(module, groups, dtypes, device_type)
        elif parts & dtypes.keys():
            module.forward = in_precision(module.forward, dtypes[parts.pop()])

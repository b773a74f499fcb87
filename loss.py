"""
What the network is trained on: boxes compared (IoU, GIoU, CIoU), objects assigned to anchor points (TAL), three losses.

    box   1 - CIoU                between a point's box and its object's              x 7.5
    cls   binary cross entropy    between class logits and soft targets               x 0.5
    dfl   two-bin cross entropy   between 16-bin distances to sides and true ones     x 1.5

Each point is either background or responsible for exactly one object. `assign` decides which at every step, from the
network's current predictions: of the points inside an object's box, the (up to) ten whose class score and overlap with
it are best are trained on this object, and the soft class target ranks them. A point is the centre of a cell of the
maps P3, P4 and P5, which are 1/8, 1/16 and 1/32 of the image's size.

Boxes are xyxy in pixels of the network input everywhere. Nothing here imports anything of ours.

Papers: GIoU, Rezatofighi et al. 2019 (1902.09630); CIoU, Zheng et al. 2020 (1911.08287); distribution focal loss, Li et
al. 2020 (2006.04388); task alignment, Feng et al. 2021 (2108.07755).
"""
import math

import torch
import torch.nn.functional as F

# --- boxes ---------------------------------------------------------------------------------------------------------

def box_iou(a, b):
    """IoU of every a (N, 4) with every b (M, 4) -> (N, M). A box without area overlaps nothing: 0, not NaN."""
    lt = torch.maximum(a[:, None, :2], b[None, :, :2])                                # (N, M, 2)
    rb = torch.minimum(a[:, None, 2:], b[None, :, 2:])                                # (N, M, 2)
    intersection = (rb - lt).clamp_(min=0).prod(2)                                    # (N, M)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    return intersection / (area_a[:, None] + area_b[None] - intersection).clamp_(min=1e-12)


def bbox_iou(a, b, kind='iou', eps=1e-7):
    """
    Elementwise IoU, GIoU or CIoU of a and b, both (..., 4) -> (...).

    IoU says nothing about boxes that do not touch. GIoU subtracts the share of the enclosing box that neither covers.
    CIoU subtracts the squared distance of the centres over the squared diagonal of the enclosing box, and a penalty
    for another aspect ratio, weighted by how much the boxes already overlap (a weight that is not differentiated).
    """
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    intersection = ((torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
                    * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0))
    union = aw * ah + bw * bh - intersection + eps
    iou = intersection / union
    if kind == 'iou':
        return iou
    enclosing_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    enclosing_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    if kind == 'giou':
        enclosing_area = enclosing_w * enclosing_h + eps
        return iou - (enclosing_area - union) / enclosing_area
    distance = ((ax1 + ax2 - bx1 - bx2) / 2) ** 2 + ((ay1 + ay2 - by1 - by2) / 2) ** 2
    angle = torch.atan2(aw, ah.clamp(min=eps)) - torch.atan2(bw, bh.clamp(min=eps))   # of the diagonals
    shape = (angle * 2 / math.pi) ** 2                                                # v in the paper
    weight = (shape / (1 - iou + shape + eps)).detach()                               # alpha in the paper
    return iou - distance / (enclosing_w.square() + enclosing_h.square() + eps) - weight * shape


def ciou(a, b):
    """Elementwise Complete IoU of a and b, both (..., 4) -> (...), at most 1."""
    return bbox_iou(a, b, 'ciou')


# --- points and distances ---------------------------------------------------------------------------------------------

def make_anchor_points(maps, strides=(8, 16, 32)):
    """The centres of all cells in pixels, points (A, 2) as x, y and their stride (A, 1): P3, P4, P5 in row order."""
    points, cell_strides = [], []
    for m, s in zip(maps, strides, strict=True):
        H, W = m.shape[2:]
        y, x = torch.meshgrid(torch.arange(H, device=m.device), torch.arange(W, device=m.device), indexing='ij')
        points.append((torch.stack((x, y), -1).reshape(-1, 2).float() + 0.5) * s)
        cell_strides.append(points[-1].new_full((H * W, 1), s))
    return torch.cat(points), torch.cat(cell_strides)


def flatten_maps(maps):
    """Three raw maps (B, 64 + K, H, W) -> box logits (B, A, 64) and class logits (B, A, K), in float32."""
    rows = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)                 # (B, A, 64 + K)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows[..., :64], rows[..., 64:]


def decode_boxes(box_logits, points, strides):
    """
    box_logits (..., A, 64), four distances (to the left, top, right and bottom side) x 16 bins; points (A, 2), strides
    (A, 1) in pixels -> boxes (..., A, 4) xyxy. A distance is the expectation over its bins, 0 to 15 strides.
    """
    bins = torch.arange(16, dtype=box_logits.dtype, device=box_logits.device)
    distance = (box_logits.unflatten(-1, (4, 16)).softmax(-1) * bins).sum(-1) * strides  # (..., A, 4)
    return torch.cat((points - distance[..., :2], points + distance[..., 2:]), -1)


# --- assignment ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def assign(scores, boxes, points, gt_labels, gt_boxes, topk=10, alpha=0.5, beta=6.0, eps=1e-9, budget=None):
    """
    Task-aligned assignment (Feng et al. 2021), memory bounded however many objects there are.

    scores (B, A, K) probabilities, boxes (B, A, 4), points (A, 2), gt_labels (B, M) with -1 for padding, gt_boxes
    (B, M, 4) -> assigned_gt_idx (B, A), the object's index or -1 for background, and target_scores (B, A, K) in 0..1.

    All objects of the batch form one list of G objects, worked through in chunks of `budget` object-point pairs, so
    that 2,000 objects on 33,600 points need tens of megabytes instead of gigabytes (about 200 where all boxes cover the
    whole image); no result depends on the chunking. Every chunk makes the CPU wait for the GPU once, so chunks are four
    times as large there.
    """
    B, A, K = scores.shape
    budget = budget or (2 ** 22 if scores.is_cuda else 2 ** 20)
    image, slot = (gt_labels >= 0).nonzero(as_tuple=True)                             # (G,) each
    label, box = gt_labels[image, slot], gt_boxes[image, slot].to(boxes.dtype)        # (G,), (G, 4)
    G = len(image)
    target_scores = torch.zeros(B, A, K, dtype=scores.dtype, device=scores.device)
    if G == 0:
        return torch.full((B, A), -1, dtype=torch.long, device=scores.device), target_scores
    scores, boxes = scores.reshape(-1, K), boxes.reshape(-1, 4)                       # (B * A, K), (B * A, 4)

    # 1) an object claims the topk points inside its box with the highest alignment metric, score^alpha * CIoU^beta
    num_claims = torch.zeros(B * A, dtype=torch.long, device=scores.device)           # how many objects claim a point
    claiming_gt = torch.zeros_like(num_claims)                            # one of them; used where it is the only one
    best_key = torch.full_like(num_claims, -1)                          # sort key (see below) of the best object there
    chunk = max(1, budget // A)                                                       # objects at a time
    for first in range(0, G, chunk):
        g = slice(first, first + chunk)
        x1, y1, x2, y2 = box[g, :, None].unbind(1)                                    # (g, 1) each
        inside = (points[:, 0] > x1) & (points[:, 0] < x2) & (points[:, 1] > y1) & (points[:, 1] < y2)  # (g, A)
        obj, point = inside.nonzero(as_tuple=True)                                    # (P,) pairs: point inside object
        row = image[g][obj] * A + point                                               # (P,) that point among B * A
        iou = ciou(box[g][obj], boxes[row]).clamp_(min=0)                             # (P,)
        alignment_metric = scores[row, label[g][obj]] ** alpha * iou ** beta          # (P,)
        metrics = torch.zeros(inside.shape, dtype=alignment_metric.dtype, device=alignment_metric.device)  # (g, A)
        metrics[obj, point] = alignment_metric
        top_metric, top_point = metrics.topk(min(topk, A), 1)                         # (g, topk)
        claims = (top_metric > 0).long()                                              # metric 0: no claim
        claimed_row = (image[g, None] * A + top_point).flatten()
        num_claims.index_add_(0, claimed_row, claims.flatten())
        gt = torch.arange(first, first + len(top_metric), device=boxes.device)[:, None]  # (g, 1) into the list of G
        claiming_gt.scatter_reduce_(0, claimed_row, (claims * gt).flatten(), 'amax')
        # a sort key of 64 bits: the IoU's bits (those of a float >= 0 order like the float) above G - 1 - object. Its
        # maximum is the highest IoU and, of equal ones, the first object
        key = (iou.float().view(torch.int32).long() << 32) + (G - 1 - first - obj)
        best_key.scatter_reduce_(0, row, key, 'amax')

    # 2) a point claimed by several goes to the object with the highest CIoU among all that contain it
    gt_idx = torch.where(num_claims > 1, G - 1 - (best_key & 0xffffffff), claiming_gt)  # (B * A,) into the list of G
    foreground = num_claims > 0                                                       # (B * A,) elsewhere gt_idx is 0
    assigned_gt_idx = slot[gt_idx].masked_fill(~foreground, -1).view(B, A)

    # 3) soft targets: alignment metrics, scaled per object so that its largest becomes its points' highest CIoU
    rows = torch.arange(B * A, device=scores.device)
    iou = ciou(box[gt_idx], boxes).clamp_(min=0).masked_fill_(~foreground, 0)          # (B * A,)
    alignment_metric = scores[rows, label[gt_idx]] ** alpha * iou ** beta
    max_metric = alignment_metric.new_zeros(G).scatter_reduce_(0, gt_idx, alignment_metric, 'amax')
    max_iou = torch.zeros_like(max_metric).scatter_reduce_(0, gt_idx, iou, 'amax')
    target_scores.view(-1, K)[rows, label[gt_idx]] = alignment_metric * max_iou[gt_idx] / (max_metric[gt_idx] + eps)
    return assigned_gt_idx, target_scores


# --- losses ----------------------------------------------------------------------------------------------------------

def dfl(box_logits, distance):
    """
    Distribution focal loss. box_logits (n, 4, 16), distance (n, 4) the target in strides -> (n,).

    The target lies between two bins; the loss is the cross entropy with all mass on these two, split so that
    the expectation is exact.
    """
    distance = distance.clamp(0, 15 - 0.01)
    low = distance.floor()
    log_p = box_logits.log_softmax(-1)                                                # (n, 4, 16)
    at_low = log_p.gather(2, low.long()[..., None])[..., 0]                           # (n, 4)
    at_high = log_p.gather(2, low.long()[..., None] + 1)[..., 0]
    return -(at_low * (low + 1 - distance) + at_high * (distance - low)).mean(1)


def detection_loss(maps, targets, loss_weights=(7.5, 0.5, 1.5), topk=10):
    """
    maps: three raw maps (B, 64 + K, H, W); targets: labels (B, M) with -1 for padding, boxes (B, M, 4) in pixels
    -> sums, normalizer: dict(box=, cls=, dfl=) of scalars, weighted by `loss_weights`, and the scalar that each is to
    be divided by, the sum of the target scores (where that is below 1, by 1).

    They come undivided so that sums over micro-batches and ranks can be divided once, by the normalizer of the whole
    batch, which no part of it knows alone; total_loss does it for one batch. An image or batch without objects keeps
    the graph: its box terms are sums over nothing.
    """
    box_logits, logits = flatten_maps(maps)                                           # (B, A, 64), (B, A, K)
    points, strides = make_anchor_points(maps)                                        # (A, 2), (A, 1)
    labels, gt_boxes = targets['labels'], targets['boxes'].to(box_logits.dtype)
    with torch.no_grad():
        boxes = decode_boxes(box_logits, points, strides)                             # (B, A, 4)
    assigned_gt_idx, target_scores = assign(logits.detach().sigmoid(), boxes, points, labels, gt_boxes, topk)

    b, a = (assigned_gt_idx >= 0).nonzero(as_tuple=True)                              # (F,) foreground points
    weight = target_scores[b, a].sum(1)                                               # (F,)
    gt = gt_boxes[b, assigned_gt_idx[b, a]]                                           # (F, 4)
    fg_logits = box_logits[b, a]                                                      # (F, 64)
    box_loss = ((1 - ciou(decode_boxes(fg_logits, points[a], strides[a]), gt)) * weight).sum()
    distance = torch.cat((points[a] - gt[:, :2], gt[:, 2:] - points[a]), 1) / strides[a]
    dfl_loss = (dfl(fg_logits.unflatten(1, (4, 16)), distance) * weight).sum()
    cls_loss = F.binary_cross_entropy_with_logits(logits, target_scores, reduction='sum')

    sums = dict(box=loss_weights[0] * box_loss, cls=loss_weights[1] * cls_loss, dfl=loss_weights[2] * dfl_loss)
    return sums, target_scores.sum()


def total_loss(losses):
    """A detector's losses, {part: (sums, normalizer)}, of one batch -> the scalar to call backward() on."""
    return sum(sum(sums.values()) / normalizer.clamp(min=1) for sums, normalizer in losses.values())

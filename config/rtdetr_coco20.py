# The baseline: RT-DETR on the backbone of scale l, on the same 20 % of COCO, the same loop and the same evaluation.
#   python train.py config/rtdetr_coco20.py --init_from=out/yolov8_coco20/best.pt
#   torchrun --nproc_per_node=8 train.py config/rtdetr_coco20.py --init_from=out/yolov8_coco20/best.pt
# hardware, hours, AP: not measured yet. The design claims 39.1; RT-DETR-R50 on all of COCO, 72 epochs: 53.1 (published)
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/rtdetr_coco20'
arch = 'rtdetr'

# the published recipe; it starts from a pretrained backbone (--init_from=...), and never was trained from scratch
lr = 1e-4
lr_backbone = 0.1
weight_decay = 1e-4
grad_clip = 1.6              # 0.1 x 16: their loss is a mean over the batch, ours a sum
warmup_epochs = 2            # about 2,000 steps would be 1.4

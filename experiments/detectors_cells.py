# The three detectors on blood cells (BCCD, MIT; its own lists as COCO json below data/bccd), 320 px. RT-DETR starts
# from the backbone that YOLOv8's run of the same seed has learned, so that its whole cost is both runs; and, at equal
# time, from nothing, with the 383 steps of 8 that cost what YOLOv8's 548 of 16 do.
#   python bench.py experiment experiments/detectors_cells.py
name = 'detectors_cells'
train = ('config/finetune_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json --k=0.25'
         ' --epochs=30 --batch_size=16 --mosaic=1 --warmup_epochs=2 --no_aug_epochs=5 --scale_aug=0.5')
_start = '--init_from=out/experiments/detectors_cells/YOLOv8-n_{seed}/best.pt'
_rtdetr = f'config/rtdetr_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json {_start}'
_short = '--init_from=scratch --lr_backbone=1 --epochs=10.5 --no_aug_epochs=2 --min_steps=0'
arms = (('YOLOv8-n', '--attn=---'),
        ('HSV-DET-n', '--attn=-SS'),
        ('RT-DETR-n', _rtdetr),
        ('RT-DETR-n equal time', f'{_rtdetr} {_short}'))
seeds = (0,)
test = 'data/bccd/test.json'
without = 'block4,block5'

# The three detectors on blood cells (BCCD, MIT; its own lists as COCO json below data/bccd), 320 px. RT-DETR starts
# from the backbone that YOLOv8's run of the same seed has learned, so that its whole cost is both runs.
#   python bench.py experiment experiments/detectors_cells.py
name = 'detectors_cells'
train = 'config/finetune_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json --k=0.25'
_trunk = '--init_from=out/experiments/detectors_cells/YOLOv8-n_{seed}/best.pt'
_rtdetr = f'config/rtdetr_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json {_trunk}'
arms = (('YOLOv8-n', '--attn=---'),
        ('HSV-DET-n', '--attn=-SS'),
        ('RT-DETR-n', _rtdetr))
seeds = (0,)
test = 'data/bccd/test.json'
without = 'block4,block5'

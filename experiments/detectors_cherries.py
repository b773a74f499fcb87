# The three detectors on cherries (640x640 crops of trees, one class, at 320 px; COCO json below data/cherries), as on
# the blood cells, at half as many epochs; RT-DETR at equal time has 320 steps of 8.
#   python bench.py experiment experiments/detectors_cherries.py
name = 'detectors_cherries'
train = ('config/finetune_own.py --train_data=data/cherries/train.json --val_data=data/cherries/train_val.json'
         ' --k=0.25 --epochs=15 --batch_size=16 --mosaic=1 --warmup_epochs=2 --no_aug_epochs=5 --min_steps=0'
         ' --scale_aug=0.5')
_start = '--init_from=out/experiments/detectors_cherries/YOLOv8-n_{seed}/best.pt'
_rtdetr = (f'config/rtdetr_own.py --train_data=data/cherries/train.json --val_data=data/cherries/train_val.json'
           f' --epochs=12 {_start}')
_short = '--init_from=scratch --lr_backbone=1 --epochs=5.8 --warmup_epochs=1 --no_aug_epochs=1 --min_steps=0'
arms = (('YOLOv8-n', '--attn=---'),
        ('HSV-DET-n', '--attn=-SS'),
        ('RT-DETR-n', _rtdetr),
        ('RT-DETR-n equal time', f'{_rtdetr} {_short}'))
seeds = (0,)
test = 'data/cherries/test.json'
without = 'block4,block5'

# Fewer steps for the quick start: 2 epochs instead of 4, one change at a time, tested on 500 pictures of another seed,
# on which the settings are chosen.
#   python -m prepare.shapes --out=data/shapes
#   python -m prepare.shapes --out=data/shapes_pick --seed=2 --train=1 --val=500
#   python bench.py experiment experiments/recipe_shapes.py
name = 'recipe_shapes'
train = 'config/shapes.py --val_data=data/shapes_pick/val.json --make_data= --epochs=2 --warmup_epochs=0.5'
arms = (('2 epochs', ''),
        ('lr 25e-3', '--lr=25e-3'),
        ('warm-up 0.2', '--warmup_epochs=0.2'),
        ('no colour', '--hsv_h=0 --hsv_s=0 --hsv_v=0'),
        ('EMA 100', '--ema_tau=100'),
        ('batch 4', '--batch_size=4'),
        ('batch 4 lr 10e-3', '--batch_size=4 --lr=10e-3'),
        ('batch 16 4 epochs', '--batch_size=16 --epochs=4 --warmup_epochs=1'),
        ('momentum 0.9', '--momentum=0.9'),
        ('160 px', '--imgsz=160'),
        ('YOLOv8', '--attn=---'),
        ('4 epochs', '--epochs=4'))
seeds = (0, 1)
test = 'data/shapes_pick/val.json'
evaluate = '--occlusion=False'

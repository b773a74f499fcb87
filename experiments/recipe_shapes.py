# Fewer steps for the quick start, one change at a time, tested on 500 pictures of another seed, on which the settings
# are chosen. The first arms start from config/shapes.py as it was: 4 epochs, lr 15e-3, colours varied.
#   python -m prepare.shapes --out=data/shapes
#   python -m prepare.shapes --out=data/shapes_pick --seed=2 --train=1 --val=500
#   python bench.py experiment experiments/recipe_shapes.py
name = 'recipe_shapes'
train = ('config/shapes.py --val_data=data/shapes_pick/val.json --make_data= --epochs=2 --warmup_epochs=0.5 --lr=15e-3'
         ' --hsv_h=0.015 --hsv_s=0.7 --hsv_v=0.4')
_no_colour = '--hsv_h=0 --hsv_s=0 --hsv_v=0'
arms = (('2 epochs', ''),
        ('lr 25e-3', '--lr=25e-3'),
        ('no colour', _no_colour),
        ('160 px', '--imgsz=160'),
        ('no colour lr 25e-3', f'{_no_colour} --lr=25e-3'),
        ('no colour lr 25e-3 3 epochs', f'{_no_colour} --lr=25e-3 --epochs=3'))
seeds = (0,)
test = 'data/shapes_pick/val.json'
evaluate = '--occlusion=False'

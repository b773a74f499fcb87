# Tokens of another level, and how many: strips of 1,024 px whose discs have the class of a cue 10 to 1,000 px away
# (prepare/long_range.py), with 32 of 128 tokens at P4 and 16 of 32 at P5. P4's tokens attend to P5's too
# (memory='scale'), to those of another picture (the control), or to 16 more of their own (as many keys). How many: one
# budget for both levels (keep='joint'), a number per picture (keep='mass:0.5': 18 at P4 and 7 at P5 on average in the
# first seed), and that mean, fixed.
#   python -m prepare.long_range --out=data/levels --width=1024 --near=64 --far=1024
#   python -m prepare.long_range --out=data/levels_test --width=1024 --near=64 --far=1024 --seed=1 --train=1 --val=500
#   python bench.py experiment experiments/levels.py
name = 'levels'
train = ('config/long_range.py --train_data=data/levels/train.json --val_data=data/levels/val.json --make_data='
         ' --imgsz=(32,1024) --epochs=2 --batch_size=8 --optimizer=muon --lr=15e-3 --momentum=0.95 --ema_tau=100')
_k = "--k='(0,32,16)'"
arms = (('fixed', _k),
        ('memory of P5', f'{_k} --memory=scale'),
        ('shuffled memory', f'{_k} --memory=scale:shuffled'),
        ('more of P4', "--k='(0,48,16)'"),
        ('one budget', f'{_k} --keep=joint'),
        ('half of the importance', "--k='(0,64,32)' --keep=mass:0.5"),
        ('fixed at its mean', "--k='(0,18,7)'"),
        ('YOLOv8', '--attn=---'))
test = 'data/levels_test/val.json'
evaluate = '--occlusion=False'
without = 'block4,block5'

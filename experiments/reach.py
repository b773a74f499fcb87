# How far does it see? Discs whose class is the colour of a cue, 10 to 2,000 px away (prepare/long_range.py): what the
# convolutions reach, what attention adds, and what as many parameters in convolutions add.
#   python -m prepare.long_range --out=data/any_range --near=64
#   python -m prepare.long_range --out=data/any_range_test --near=64 --seed=1 --train=1 --val=500
#   python bench.py experiment experiments/reach.py
name = 'reach'
train = ('config/long_range.py --train_data=data/any_range/train.json --val_data=data/any_range/val.json --make_data='
         ' --epochs=2 --batch_size=8 --optimizer=muon --lr=15e-3 --momentum=0.95 --ema_tau=100')
arms = (('YOLOv8', '--attn=---'),
        ('S sparse', '--attn=-SS'),
        ('C convolutions', '--attn=-CC'))
seeds = (0, 1, 2, 3, 4)
test = 'data/any_range_test/val.json'
evaluate = '--occlusion=False'
without = 'block4,block5'

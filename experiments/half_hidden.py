# What the block is worth where context is needed in part: strips whose discs, 10 to 2,000 px from the cue, are white in
# one case of two and show their colour in the other. In C as many parameters are convolutions; P is a published layer
# on the selected tokens; below them attention's other letters. (k counts for S, P and T.)
#   python -m prepare.long_range --out=data/half_hidden --near=64 --hidden=0.5
#   python -m prepare.long_range --out=data/half_hidden_test --near=64 --hidden=0.5 --seed=1 --train=1 --val=500
#   python bench.py experiment experiments/half_hidden.py
name = 'half_hidden'
train = ('config/long_range.py --train_data=data/half_hidden/train.json --val_data=data/half_hidden/val.json'
         ' --make_data= --epochs=2 --batch_size=8 --optimizer=muon --lr=15e-3 --momentum=0.95 --ema_tau=100')
arms = (('C convolutions', '--attn=-CC'),
        ('S sparse', '--attn=-SS'),
        ('YOLOv8', '--attn=---'),
        ('P published', '--attn=-PP'),
        ('F full', '--attn=-FF'),
        ('D dense path', '--attn=-DD'),
        ('W window', '--attn=-WW'),
        ('L latent', '--attn=-LL'),
        ('N native sparse', '--attn=-NN'),
        ('K kernel density', '--attn=-KK'),
        ('M Fourier', '--attn=-MM'),
        ('T tokens only', '--attn=-TT'),
        ('S faster block', '--attn=-SS --lr_block=3'),
        ('S learned', '--attn=-SS --select=learned'))
seeds = (0, 1, 2, 3, 4)
test = 'data/half_hidden_test/val.json'
evaluate = '--occlusion=False'
without = 'block4,block5'

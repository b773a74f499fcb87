# config/finetune_own.py as it is, on blood cells: what a user gets, and what a block adds to it. BCCD's own lists as
# COCO json below data/bccd; k=0.25 is 100 of 400 tokens at P4 and 25 of 100 at P5.
#   python bench.py experiment experiments/own_cells.py
name = 'own_cells'
train = 'config/finetune_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json --k=0.25'
arms = (('---', '--attn=---'),
        ('-SS', '--attn=-SS'),
        ('-CC', '--attn=-CC'),
        ('-PP', '--attn=-PP'),
        ('-FF', '--attn=-FF'),
        ('-DD', '--attn=-DD'),
        ('-WW', '--attn=-WW'),
        ('-LL', '--attn=-LL'),
        ('-NN', '--attn=-NN'),
        ('-KK', '--attn=-KK'),
        ('-MM', '--attn=-MM'),
        ('-TT', '--attn=-TT'),
        ('30 epochs', '--attn=--- --epochs=30'),
        ('60 epochs', '--attn=--- --epochs=60 --no_aug_epochs=6 --mosaic=1 --scale_aug=0.5'))
seeds = (0, 1, 2, 3, 4)
test = 'data/bccd/test.json'
without = 'block4,block5'

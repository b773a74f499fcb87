# What the block is worth on blood cells (BCCD, its own lists as COCO json below data/bccd), 320 px, and whether memory
# of P5 or another number of tokens changes that. k=0.25 is 100 of 400 tokens at P4 and 25 of 100 at P5.
#   python bench.py experiment experiments/blocks_cells.py
name = 'blocks_cells'
train = ('config/finetune_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json --k=0.25'
         ' --scale_aug=0.5')
arms = (('---', '--attn=---'),
        ('-SS', '--attn=-SS'),
        ('-SS memory of P5', '--attn=-SS --memory=scale'),
        ('-SS half of the importance', '--attn=-SS --k=0.5 --keep=mass:0.5'),
        ('-SS one budget', "--attn=-SS --k='(0,100,25)' --keep=joint"),
        ('-CC', '--attn=-CC'),
        ('-PP', '--attn=-PP'))
test = 'data/bccd/test.json'
without = 'block4,block5'

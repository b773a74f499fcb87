# What the block is worth on cherries (640x640 crops of trees, one class, at 320 px; COCO json below data/cherries), as
# on the blood cells (experiments/blocks_cells.py), at 10 epochs.
#   python bench.py experiment experiments/blocks_cherries.py
name = 'blocks_cherries'
train = ('config/finetune_own.py --train_data=data/cherries/train.json --val_data=data/cherries/train_val.json --k=0.25'
         ' --epochs=10')
arms = (('---', '--attn=---'),
        ('-SS', '--attn=-SS'),
        ('-SS memory of P5', '--attn=-SS --memory=scale'),
        ('-SS half of the importance', '--attn=-SS --k=0.5 --keep=mass:0.5'),
        ('-SS one budget', "--attn=-SS --k='(0,100,25)' --keep=joint"),
        ('-CC', '--attn=-CC'),
        ('-PP', '--attn=-PP'))
test = 'data/cherries/test.json'
without = 'block4,block5'

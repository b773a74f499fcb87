# What the block is worth on cherries (640x640 crops of trees, one class, at 320 px; COCO json below data/cherries): the
# arms of the blood cells, at 10 epochs.
#   python bench.py experiment experiments/blocks_cherries.py
exec(open('experiments/blocks_cells.py').read())
name = 'blocks_cherries'
train = ('config/finetune_own.py --train_data=data/cherries/train.json --val_data=data/cherries/train_val.json --k=0.25'
         ' --epochs=10 --scale_aug=0.5')
test = 'data/cherries/test.json'

# own_cells.py with cherries (640x640 crops of trees, one class, at 320 px; COCO json below data/cherries).
#   python bench.py experiment experiments/own_cherries.py
exec(open('experiments/own_cells.py').read())
name = 'own_cherries'
train = 'config/finetune_own.py --train_data=data/cherries/train.json --val_data=data/cherries/train_val.json --k=0.25'
test = 'data/cherries/test.json'

# Does weaker scale augmentation (recipe_cells.py) help where sizes vary with the distance? Cherries, 6 epochs, on the
# held-out fifth of the training images.
#   python data.py split data/cherries/train.json --val=0.2
#   python bench.py experiment experiments/recipe_cherries.py
name = 'recipe_cherries'
train = ('config/finetune_own.py --train_data=data/cherries/train_train.json --val_data=data/cherries/train_val.json'
         ' --k=0.25 --min_steps=0 --epochs=6 --warmup_epochs=0.8 --no_aug_epochs=0.1 --scale_aug=0.5')
arms = (('short', ''),
        ('short scale 0.2', '--scale_aug=0.2'))
seeds = (0,)
test = 'data/cherries/train_val.json'
evaluate = '--occlusion=False'

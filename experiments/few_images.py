# How few images will do? Blood cells, 320 px: 30 epochs of batches of 16; as many steps as 292 images get, by smaller
# batches and more epochs; and with min_steps. Subsets: data.py split with --val=0.8288 and --val=0.6575,
# each time both of its files moved away, and the first is what is named below. The last arm had --threads=2.
#   python bench.py experiment experiments/few_images.py
name = 'few_images'
train = ('config/finetune_own.py --val_data=data/bccd/trainval_val.json --k=0.25 --epochs=30 --batch_size=16 --mosaic=1'
         ' --warmup_epochs=2 --no_aug_epochs=5 --min_steps=0 --scale_aug=0.5')
arms = (('292 images', '--train_data=data/bccd/trainval.json'),
        ('100 images', '--train_data=data/bccd/train_100.json'),
        ('100 images as many steps', '--train_data=data/bccd/train_100.json --batch_size=8 --epochs=44'),
        ('51 images', '--train_data=data/bccd/train_51.json'),
        ('51 images as many steps', '--train_data=data/bccd/train_51.json --batch_size=8 --epochs=88'),
        ('51 images min_steps', '--train_data=data/bccd/train_51.json --min_steps=500'))
seeds = (0,)
test = 'data/bccd/test.json'
without = 'block4,block5'

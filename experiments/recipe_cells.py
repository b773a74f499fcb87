# What makes few epochs enough: one change at a time on blood cells, 320 px, 234 images to train and 58 held out, on
# which the settings are chosen; the test images play no part here.
#   python data.py split data/bccd/trainval.json --val=0.2
#   python bench.py experiment experiments/recipe_cells.py
name = 'recipe_cells'
train = ('config/finetune_own.py --train_data=data/bccd/trainval_train.json --val_data=data/bccd/trainval_val.json'
         ' --k=0.25 --min_steps=0 --warmup_epochs=1 --no_aug_epochs=1 --mosaic=1 --scale_aug=0.5')
_first = '--batch_size=8 --epochs=8 --mosaic=0 --warmup_epochs=0.8 --no_aug_epochs=0.8'
_short = '--batch_size=8 --epochs=8 --mosaic=0 --warmup_epochs=0.8 --no_aug_epochs=0.1'
arms = (('batch 8', '--batch_size=8 --epochs=10'),
        ('batch 4', '--batch_size=4 --epochs=10'),
        ('batch 4 lr 8e-3', '--batch_size=4 --epochs=10 --lr=8e-3'),
        ('batch 8 no Mosaic', '--batch_size=8 --epochs=10 --mosaic=0'),
        ('batch 4 no Mosaic', '--batch_size=4 --epochs=10 --mosaic=0'),
        ('batch 8 no Mosaic 7 epochs', '--batch_size=8 --epochs=7 --no_aug_epochs=0.5 --mosaic=0'),
        ('batch 4 no Mosaic 7 epochs', '--batch_size=4 --epochs=7 --no_aug_epochs=0.5 --mosaic=0'),
        ('batch 8 15 epochs', '--batch_size=8 --epochs=15 --no_aug_epochs=2'),
        ('batch 8 no Mosaic 15 epochs', '--batch_size=8 --epochs=15 --mosaic=0'),
        ('scale 0.2 15 epochs', '--batch_size=8 --epochs=15 --mosaic=0 --scale_aug=0.2'),
        # 8 epochs
        ('short', _first),
        ('short no last stage', _short),
        ('short lr 25e-3', f'{_short} --lr=25e-3'),
        ('short warm-up 0.3', f'{_short} --warmup_epochs=0.3'),
        ('short scale 0.2', f'{_short} --scale_aug=0.2'),
        ('short scale 0', f'{_short} --scale_aug=0'),
        ('short little colour', f'{_short} --hsv_s=0.3 --hsv_v=0.2'),
        ('short scale 0.2 lr 25e-3', f'{_short} --scale_aug=0.2 --lr=25e-3'),
        ('short scale 0.2 little colour', f'{_short} --scale_aug=0.2 --hsv_s=0.3 --hsv_v=0.2'),
        ('short scale 0.2 one cycle', f'{_short} --scale_aug=0.2 --warmup_epochs=2.4'),
        ('short scale 0.2 EMA 100', f'{_short} --scale_aug=0.2 --ema_tau=100'),
        ('short scale 0.2 momentum 0.9', f'{_short} --scale_aug=0.2 --momentum=0.9'))
seeds = (0,)
test = 'data/bccd/trainval_val.json'
evaluate = '--occlusion=False'

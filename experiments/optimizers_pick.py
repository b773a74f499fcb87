# Which learning rate suits which optimizer: blood cells, 320 px, YOLOv8, 234 images to train for 8 epochs of batches of
# 8, and 58 held out, on which it is chosen. Vectors are AdamW's except under sgd.
#   python data.py split data/bccd/trainval.json --val=0.2
#   python bench.py experiment experiments/optimizers_pick.py
name = 'optimizers_pick'
train = ('config/finetune_own.py --train_data=data/bccd/trainval_train.json --val_data=data/bccd/trainval_val.json'
         ' --attn=--- --epochs=8 --min_steps=0 --warmup_epochs=0.8 --no_aug_epochs=0.5')
_rates = dict(muon=(7e-3, 15e-3, 30e-3), adamw=(1e-3, 2e-3, 5e-3), sgd=(0.01, 0.03, 0.1), lamb=(5e-3, 15e-3, 45e-3),
              soap=(1e-3, 3e-3, 8e-3), lion=(1e-4, 3e-4, 1e-3))
_more = dict(muon='', adamw='--momentum=0.9', sgd='--weight_decay=5e-4', lamb='--momentum=0.9', soap='',
             lion='--momentum=0.9')
arms = tuple((f'{_kind} {_lr:g}', f'--optimizer={_kind} --lr={_lr:g} {_more[_kind]}')
             for _kind, _some in _rates.items() for _lr in _some)
seeds = (0,)
test = 'data/bccd/trainval_val.json'
evaluate = '--occlusion=False'

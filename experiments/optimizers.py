# An optimizer for each part of the network: config/finetune_own.py on blood cells, YOLOv8, as many steps each, with the
# learning rate that was best on held-out images (experiments/optimizers_pick.py). A part's rate is a factor on lr.
#   python bench.py experiment experiments/optimizers.py
name = 'optimizers'
train = ('config/finetune_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json'
         ' --attn=---')
arms = (('muon', '--optimizer=muon --lr=0.03'),
        ('adamw', '--optimizer=adamw --lr=0.002 --momentum=0.9'),
        ('sgd', '--optimizer=sgd --lr=0.01 --weight_decay=5e-4'),
        ('lamb', '--optimizer=lamb --lr=0.015 --momentum=0.9'),
        ('soap', '--optimizer=soap --lr=0.008'),
        ('lion', '--optimizer=lion --lr=0.001 --momentum=0.9'),
        ('muon with adamw backbone', '--lr=0.03 --optimizer_backbone=adamw --lr_backbone=0.0667'),
        ('muon with sgd backbone', '--lr=0.03 --optimizer_backbone=sgd --lr_backbone=0.333'),
        ('muon with adamw neck', '--lr=0.03 --optimizer_neck=adamw --lr_neck=0.0667'),
        ('muon with sgd neck', '--lr=0.03 --optimizer_neck=sgd --lr_neck=0.333'),
        ('muon with adamw head', '--lr=0.03 --optimizer_head=adamw --lr_head=0.0667'),
        ('muon with sgd head', '--lr=0.03 --optimizer_head=sgd --lr_head=0.333'))
seeds = (0, 1, 2)
test = 'data/bccd/test.json'
evaluate = '--occlusion=False'

# An optimizer for each part of the network, at equal time: config/finetune_own.py on blood cells, YOLOv8, each with the
# learning rate that was best on held-out images (experiments/optimizers_pick.py), and with as many epochs as fit into
# the CPU minutes of 8 with Muon. A part's rate is a factor on lr.
#   python bench.py experiment experiments/optimizers.py
name = 'optimizers'
train = ('config/finetune_own.py --train_data=data/bccd/trainval.json --val_data=data/bccd/trainval_val.json'
         ' --attn=--- --min_steps=0 --warmup_epochs=0.8 --no_aug_epochs=0.1 --epochs=8')
arms = (('muon', '--optimizer=muon --lr=0.03'),
        ('adamw', '--optimizer=adamw --lr=0.002 --momentum=0.9 --epochs=9'),
        ('soap', '--optimizer=soap --lr=0.008 --epochs=7'),
        ('lamb', '--optimizer=lamb --lr=0.015 --momentum=0.9 --epochs=9'),
        ('sgd', '--optimizer=sgd --lr=0.01 --weight_decay=5e-4 --epochs=9'),
        ('muon with adamw backbone', '--lr=0.03 --optimizer_backbone=adamw --lr_backbone=0.0667'),
        ('muon with adamw neck', '--lr=0.03 --optimizer_neck=adamw --lr_neck=0.0667'),
        ('muon with adamw head', '--lr=0.03 --optimizer_head=adamw --lr_head=0.0667'),
        ('lion', '--optimizer=lion --lr=0.001 --momentum=0.9 --epochs=9'))
seeds = (0, 1, 2)
test = 'data/bccd/test.json'
evaluate = '--occlusion=False'

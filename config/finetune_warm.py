# Weights that know your data already, a little further, for example with sparse blocks added: a gentle learning
# rate, and an average over the last hundred steps, so that AP starts where the weights stand and does not fall.
#   python train.py config/finetune_warm.py --train_data=my/train.json --val_data=my/val.json --init_from=yolov8n.pt
exec(open('config/finetune_own.py').read())
out_dir = 'out/warm'
epochs = 15
min_steps = 0
batch_size = 16
mosaic = 1.0
scale_aug = 0.5
warmup_epochs = 1
no_aug_epochs = 5
optimizer = 'adamw'          # Muon's steps are equally long in all directions: too coarse for this
momentum = 0.9
lr = 1e-4
lr_block = 5.0               # the new blocks start from nothing
ema_decay, ema_tau = 0.99, 1
eval_interval = 1

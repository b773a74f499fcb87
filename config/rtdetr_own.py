# RT-DETR on your own data, when that is hundreds of images and not a hundred thousand. It does not start from nothing:
# first train a detector of ours, whose backbone has then learned detection, and give it here:
#   python train.py config/finetune_own.py --attn=--- --out_dir=out/trunk --train_data=my/train.json --val_data=...
#   python train.py config/rtdetr_own.py --train_data=my/train.json --val_data=my/val.json --init_from=out/trunk/best.pt
# A starting point, not tuned: 88 steps from such a backbone ended at AP 0.22 on blood cells (RESULTS.md).
exec(open('config/finetune_own.py').read())
out_dir = 'out/rtdetr_own'
arch = 'rtdetr'

decoder_layers = 3           # as for the published R18
queries = 100
points = 2
class_loss = 'mal'           # DEIM's: converges in half the epochs, it claims
optimizer = 'adamw'
momentum = 0.9
lr = 4e-4
lr_backbone = 0.25
weight_decay = 1e-4
grad_clip = 1.6              # 0.1 x 16: their loss is a mean over the batch, ours a sum
warmup_epochs = 5            # some 100 steps at 300 images, not 2,000
ema_tau = 100

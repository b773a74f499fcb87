# RT-DETR on your own data, when that is hundreds of images and not a hundred thousand. It does not start from nothing:
# first train a detector of ours, whose backbone has then learned detection, and give it here:
#   python train.py config/finetune_own.py --attn=--- --out_dir=out/yolo --train_data=my/train.json --val_data=...
#   python train.py config/rtdetr_own.py --train_data=my/train.json --val_data=my/val.json --init_from=out/yolo/best.pt
# 234 blood-cell images, 58 held out: AP 0.498, 0.561, 0.583, 0.574 after 5, 10, 15, 20 epochs (RESULTS.md)
exec(open('config/finetune_own.py').read())
exec(open('config/rtdetr_n.py').read())
out_dir = 'out/rtdetr_own'

epochs = 20
warmup_epochs = 1.5          # some 50 steps at 300 images; the published 2,000 would be the whole run
no_aug_epochs = 5
batch_size = 8               # steps matter more than their size
mosaic = 1.0
scale_aug = 0.5
eval_interval = 5
lr_backbone = 0.3            # it knows detection already
ema_tau = 200

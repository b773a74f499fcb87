# Does global context help? A class that can be told only from something 1,000 px away: see prepare/long_range.py.
#   python train.py config/long_range.py --attn=-SS --seed=0      and '---', '-FF', '-DD', --select=random; seeds 0 1 2
# hardware: one CPU core, about 3 minutes a run. Chance is an AP50 near 0.33: three colours, one is right
out_dir = 'out/long_range'
make_data = 'long_range'
train_data = 'data/long_range/train.json'
val_data = 'data/long_range/val.json'
imgsz = (32, 2048)

attn = '-SS'
k = 64                       # all 64 tokens at P5 and a quarter of the 256 at P4, about what 512 are at 640x640

epochs = 4
warmup_epochs = 0.5
no_aug_epochs = 0.5
lr = 2e-3
weight_decay = 0.01
eval_interval = 1
mosaic = scale_aug = translate = 0.0
hsv_h = 0.0                  # the colour is the class

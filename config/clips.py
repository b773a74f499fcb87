# Does memory of earlier frames tell what is behind an occluder now? See prepare/clips.py.
#   python train.py config/clips.py --seed=0        and --memory=, --memory=time:shuffled, --k=0 --memory=
# hardware: one CPU core, about 5 minutes a run. Chance is an AP50 near 0.33: three colours, one is right
out_dir = 'out/clips'
make_data = 'clips'
train_data = 'data/clips/train.json'
val_data = 'data/clips/val.json'
imgsz = 64

attn = '-SS'
k = 16                       # all tokens: 16 at P4, 4 at P5
memory = 'time'
pos = True                   # a token of an earlier frame says where it was

epochs = 5
batch_size = 8
warmup_epochs = 0.5
no_aug_epochs = 0
optimizer = 'muon'
lr = 15e-3
momentum = 0.95
weight_decay = 0.01
ema_tau = 100
eval_interval = 1
mosaic = scale_aug = translate = 0.0
hsv_h = 0.0                  # the colour is the class

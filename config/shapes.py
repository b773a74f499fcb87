# Quick start: a synthetic set of overlapping shapes, made on the spot. No download, no GPU.
#   python train.py config/shapes.py
out_dir = 'out/shapes'
make_data = 'shapes'
train_data = 'data/shapes/train.json'
val_data = 'data/shapes/val.json'
imgsz = 256

epochs = 14
warmup_epochs = 1
close_epochs = 3
lr = 2e-3
weight_decay = 0.01
eval_interval = 2

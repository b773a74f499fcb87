# Quick start: a synthetic set of overlapping shapes, made on the spot. No download, no GPU.
#   python train.py config/shapes.py
# hardware: two CPU cores, about 8 minutes. AP50 0.68 after 6 of 12 epochs of an unfinished run; the end: not measured yet
out_dir = 'out/shapes'
make_data = 'shapes'
train_data = 'data/shapes/train.json'
val_data = 'data/shapes/val.json'
imgsz = 256

mosaic = 0.0                 # these pictures are crowded as they are, and eight minutes are short
scale_aug = 0.3

epochs = 13
batch_size = 8               # many steps count for more than large batches
warmup_epochs = 1
close_epochs = 2
lr = 2e-3
weight_decay = 0.01
eval_interval = 2

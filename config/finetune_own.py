# Your own data: a COCO json with its images, a YOLO folder (images/ and labels/) or a VOC folder. Look at it first:
#   python data.py check my/train.json
#   python train.py config/finetune_own.py --train_data=my/train.json --val_data=my/val.json
# Images that do not lie beside the json: --train_images=my/photos --val_images=my/photos
# Start from weights, ours or a YOLOv8 .pt of your own: --init_from=yolov8n.pt;
# if they know your data already, config/finetune_warm.py
# Fewer than some 300 images get more epochs, for steps are what they lack (RESULTS.md, "How few images"). With tens of
# thousands take fewer, --epochs=5 and --eval_interval=1, or go out for the evening
out_dir = 'out/own'
train_data = 'my/train.json'
val_data = 'my/val.json'
imgsz = 320                  # pixels of the longer side; more for small objects, 640 is usual on a GPU

epochs = 15
min_steps = 500
batch_size = 8               # many small steps, and whole pictures: the AP of 30 epochs of 16 with Mosaic
mosaic = 0.0                 # from half the images (RESULTS.md, "Fewer steps"). 60 epochs, or 100 images: --mosaic=1
scale_aug = 0.2              # and sizes vary little: 0.5, as over 100 epochs, costs so short a run 0.01 to 0.03 AP
warmup_epochs = 1
no_aug_epochs = 1
optimizer = 'muon'           # half of AdamW's epochs for the same AP
lr = 15e-3
momentum = 0.95
weight_decay = 0.01
ema_tau = 300
eval_interval = 3

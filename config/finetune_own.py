# Your own data: a COCO json with its images, a YOLO folder (images/ and labels/) or a VOC folder. Look at it first:
#   python data.py check my/train.json
#   python train.py config/finetune_own.py --train_data=my/train.json --val_data=my/val.json
# Images that do not lie beside the json: --train_images=my/photos --val_images=my/photos
# Start from weights, ours or a YOLOv8 .pt of your own: --init_from=yolov8n.pt;
# if they know your data already, config/finetune_warm.py
# Fewer than some 300 images get more epochs, for steps are what they lack (RESULTS.md, "How few images"). With tens of
# thousands take fewer, --epochs=10 and --eval_interval=1, or go out for the evening
out_dir = 'out/own'
train_data = 'my/train.json'
val_data = 'my/val.json'
imgsz = 320                  # pixels of the longer side; more for small objects, 640 is usual on a GPU

epochs = 30
min_steps = 500
warmup_epochs = 2
no_aug_epochs = 5
optimizer = 'muon'           # half of AdamW's epochs for the same AP (RESULTS.md, "Fewer steps")
lr = 15e-3
momentum = 0.95
weight_decay = 0.01
ema_tau = 300
eval_interval = 5

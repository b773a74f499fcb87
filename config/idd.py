# From COCO to Indian roads: fine-tuning on the detection set of the Indian Driving Dataset (IDD), 15 classes: person,
# rider, car, truck, bus, motorcycle, bicycle, autorickshaw, animal, traffic light, traffic sign, vehicle fallback,
# caravan, trailer, train. Get it, under its own terms, from its authors (idd.insaan.iiit.ac.in); it is Pascal VOC by
# route: JPEGImages/, Annotations/, and train.txt, val.txt of paths without suffix.
#   python data.py check data/IDD_Detection/train.txt
#   python train.py config/idd.py                                         from config/hsvdet_coco20.py's weights
#   python train.py config/idd.py --init_from=yolov8l.pt                  or from YOLOv8 weights of your own
#   python detect.py drive.mp4 --weights=out/idd/best.pt --conf=0
# hardware: one 24 GB GPU; with 8 GB --grad_accum=16, with less, or to try it, --scale=n and weights of that scale
# Not measured: nothing here was run on IDD. Not its hours, not its AP, and none of the choices below was compared.
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/idd'
init_from = 'out/hsvdet_coco20/best.pt'      # its boxes and features stay, the layers that name classes start fresh
train_data = 'data/IDD_Detection/train.txt'
val_data = 'data/IDD_Detection/val.txt'
train_images = val_images = ''
imgsz = (736, 1280)          # 1080p frames at two thirds: 720 rows do not divide by 32

epochs = 30
warmup_epochs = 1
no_aug_epochs = 5
grad_accum = 4               # four images of 16 at a time
checkpointing = True
lr = 2e-4                    # a fifth of training from scratch, so that what COCO taught is not overwritten,
lr_head = 5.0                # but not for the layers that start fresh
scale_aug = 0.5              # the camera stands on a car: sizes vary less than in photographs
eval_interval = 1

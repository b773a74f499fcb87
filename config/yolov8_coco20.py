# The same run without the block, which makes it YOLOv8-l: the baseline of every comparison.
#   python train.py config/yolov8_coco20.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/yolov8_coco20'
attn = '---'

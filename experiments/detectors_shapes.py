# The three detectors on the shapes, from scratch, with one recipe: equal numbers of images seen; RT-DETR with our block
# (k a quarter of P5) instead of its encoder's full attention; and RT-DETR in about the time of YOLOv8. RT-DETR has its
# narrow form (hidden 128, three decoder layers: the size that D-FINE-N has on such a backbone): config/rtdetr_n.py.
#   python -m prepare.shapes --out=data/shapes_test --seed=1 --train=1 --val=500        test pictures
#   python bench.py experiment experiments/detectors_shapes.py
name = 'detectors_shapes'
train = 'config/shapes.py'
arms = (('YOLOv8-n', '--attn=---'),
        ('HSV-DET-n', '--attn=-SS'),
        ('RT-DETR-n', 'config/rtdetr_n.py'),
        ('RT-DETR-n sparse encoder', 'config/rtdetr_n.py --encoder_attn=S'),
        ('RT-DETR-n equal time', 'config/rtdetr_n.py --epochs=1.5 --warmup_epochs=0.2'))
test = 'data/shapes_test/val.json'
without = 'block4,block5'

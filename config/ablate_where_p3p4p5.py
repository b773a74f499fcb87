# Ablation, where the block sits: P3, P4 and P5 (38.8 claimed).
#   python train.py config/ablate_where_p3p4p5.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_where_p3p4p5'
attn = 'SSS'

# Ablation, where the block sits: P4 and P5, the design itself (38.6 claimed).
#   python train.py config/ablate_where_p4p5.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_where_p4p5'
attn = '-SS'

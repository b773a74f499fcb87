# Ablation, where the block sits: P5 alone (37.9 claimed).
#   python train.py config/ablate_where_p5.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_where_p5'
attn = '--S'

# Ablation, where the block sits: nowhere (37.4 claimed).
#   python train.py config/ablate_where_none.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_where_none'
attn = '---'

# Ablation, the control: the dense 1x1 path alone, nobody attends (no claim).
#   python train.py config/ablate_control_dense.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_control_dense'
attn = '-DD'

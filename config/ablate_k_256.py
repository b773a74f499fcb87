# Ablation, how many tokens attend: 256 (38.1 claimed).
#   python train.py config/ablate_k_256.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_k_256'
k = 256

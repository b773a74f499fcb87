# Ablation, how many tokens attend: 1,024 (38.8 claimed).
#   python train.py config/ablate_k_1024.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_k_1024'
k = 1024

# Ablation, how many tokens attend: all of them (39.0 claimed).
#   python train.py config/ablate_k_all.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_k_all'
k = 0

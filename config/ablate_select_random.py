# Ablation, which tokens attend: random ones (37.8 claimed).
#   python train.py config/ablate_select_random.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_select_random'
select = 'random'

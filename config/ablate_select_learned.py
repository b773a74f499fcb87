# Ablation, which tokens attend: a learned score, with a gradient path (38.7 claimed).
#   python train.py config/ablate_select_learned.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_select_learned'
select = 'learned'

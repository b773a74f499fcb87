# Ablation, which tokens attend: largest norm (38.4 claimed). Orders tokens exactly as the squared norm does.
#   python train.py config/ablate_select_l2.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_select_l2'
select = 'l2'

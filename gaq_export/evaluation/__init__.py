"""How good images and predicted noise are: PSNR, SSIM, LPIPS, Frechet and kernel distances, SQNR."""

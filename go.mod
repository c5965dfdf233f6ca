module barevif

go 1.26

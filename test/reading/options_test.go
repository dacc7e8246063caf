//go:build linux

package reading

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

// TestOpenOptions opens a part of a raw file, and images with another data file
// than they name.
func TestOpenOptions(t *testing.T) {
	qemu, instar := qemuImg72(t), program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f raw r.raw 4M
qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 1M 1M' r.raw
qemu-img create -q -f raw odd.raw 1000
truncate -s 1000 odd.raw
qemu-img create -q -f qcow2 q.qcow2 1M
qemu-img create -q -f qcow2 -b r.raw -F raw over.qcow2 3M
qemu-img create -q -f qcow2 -o data_file=d.raw d.qcow2 1M
qemu-io -c 'write -P 5 0 64k' d.qcow2
cp d.raw other.raw
qemu-io -f raw -c 'write -P 6 0 64k' other.raw
`)
	compareLines(t, dir, "7.2", instar, qemu, `
map --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw
map --image-opts driver=raw,offset=0x100000,file.filename=r.raw
map --output=json --image-opts driver=raw,offset=1M,size=2M,file.filename=r.raw
map --output=json --image-opts driver=raw,offset=1M,file.filename=r.raw
map --output=json --image-opts driver=raw,size=512,file.filename=r.raw
map --output=json --image-opts driver=raw,size=0,file.filename=r.raw
map --output=json --image-opts offset=1M,file.filename=r.raw
map --output=json 'json:{"driver":"raw","offset":1048576,"size":"1M","file.filename":"r.raw"}'
map --output=json --image-opts driver=raw,offset=4M,file.filename=r.raw
map --output=json --image-opts driver=raw,offset=512,file.filename=odd.raw
map --output=json --image-opts driver=qcow2,file.filename=over.qcow2,backing.driver=raw,backing.offset=1M,backing.file.filename=r.raw
measure -O qcow2 --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw
measure -O raw --image-opts driver=raw,offset=1000,file.filename=r.raw
compare --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw driver=raw,offset=2M,size=1M,file.filename=r.raw
info --image-opts driver=raw,size=1000,file.filename=r.raw
info --image-opts driver=raw,offset=5M,file.filename=r.raw
info --image-opts driver=raw,offset=1M,size=4M,file.filename=r.raw
info --image-opts driver=raw,size=1025,file.filename=odd.raw
code info --image-opts driver=raw,offset=foo,file.filename=r.raw
code info 'json:{"driver":"raw","offset":-1,"file.filename":"r.raw"}'
info --image-opts driver=qcow2,offset=1M,file.filename=q.qcow2
info --image-opts driver=qcow2,data-file.filename=nope,file.filename=d.qcow2
map --image-opts driver=qcow2,file.filename=d.qcow2,data-file.filename=other.raw
map --image-opts driver=qcow2,file.filename=d.qcow2,data-file.driver=file,data-file.filename=other.raw
map --image-opts driver=qcow2,file.filename=d.qcow2,data-file.driver=raw,data-file.file.filename=other.raw
map --image-opts driver=qcow2,file.filename=d.qcow2,data-file.filename=nope
map --image-opts driver=qcow2,file.filename=q.qcow2,data-file.filename=other.raw
map 'json:{"driver":"qcow2","file":{"filename":"d.qcow2"},"data-file":{"driver":"file","filename":"other.raw"}}'
map 'json:{"driver":"qcow2","file":{"filename":"d.qcow2"},"data-file":"x"}'
check --image-opts driver=qcow2,file.filename=d.qcow2,data-file.filename=other.raw
`)
	formattest.Script(t, dir, `
qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M
`)
	t.Run("10.0", func(t *testing.T) {
		compareLines(t, dir, "10.0", instar, qemuImg10(t), `
map --image-opts driver=qcow2,discard-no-unref=true,file.driver=file,file.filename=q.qcow2
map --image-opts driver=qcow2,discard-no-unref=off,file.filename=v2.qcow2
map --image-opts driver=qcow2,discard-no-unref=on,file.filename=v2.qcow2
map --image-opts driver=qcow2,discard-no-unref=foo,file.filename=q.qcow2
map --image-opts driver=raw,discard-no-unref=on,file.filename=q.qcow2
map 'json:{"driver":"qcow2","discard-no-unref":true,"file.filename":"q.qcow2"}'
`)
		// As Proxmox VE names a new volume.
		formattest.Script(t, dir, strings.ReplaceAll(`
qemu-img create -q -f qcow2 new.qcow2 4M
INSTAR convert -p -n -f raw --target-image-opts r.raw driver=qcow2,discard-no-unref=true,file.driver=file,file.filename=new.qcow2
qemu-img compare r.raw new.qcow2
`, "INSTAR", instar))
	})
	script := func(text string) {
		t.Helper()
		formattest.Script(t, dir, strings.ReplaceAll(text, "INSTAR", instar))
	}
	script(`
qemu-img convert -O raw --image-opts driver=raw,offset=1M,size=2M,file.filename=r.raw theirs
INSTAR convert -O raw --image-opts driver=raw,offset=1M,size=2M,file.filename=r.raw ours
cmp theirs ours
qemu-img convert -O raw --image-opts driver=qcow2,file.filename=d.qcow2,data-file.filename=other.raw theirs
INSTAR convert -O raw --image-opts driver=qcow2,file.filename=d.qcow2,data-file.filename=other.raw ours
cmp theirs ours
`)
	// Targets: what lies before and behind the part stays as it is.
	for _, at := range []string{"offset=1M,size=1M", "offset=1000,size=1M", "offset=3M"} {
		script(strings.ReplaceAll(`
cp r.raw theirs
cp r.raw ours
qemu-img convert -n --target-image-opts -f qcow2 d.qcow2 driver=raw,AT,file.filename=theirs
INSTAR convert -n --target-image-opts -f qcow2 d.qcow2 driver=raw,AT,file.filename=ours
cmp theirs ours
`, "AT", at))
	}
	script(`
cp d.qcow2 theirs.qcow2
cp d.qcow2 ours.qcow2
cp d.raw theirs
cp d.raw ours
cp d.raw kept
qemu-img convert -n --target-image-opts --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw driver=qcow2,file.filename=theirs.qcow2,data-file.filename=theirs
INSTAR convert -n --target-image-opts --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw driver=qcow2,file.filename=ours.qcow2,data-file.filename=ours
cmp theirs ours
cmp kept d.raw
`)
	// What the user names is not what the image names.
	for _, c := range []struct {
		name string
		code int
	}{
		{"driver=qcow2,file.filename=d.qcow2,data-file.filename=other.raw", 0},
		{"driver=qcow2,file.filename=d.qcow2", 1},
		{"driver=qcow2,file.filename=d.qcow2,data-file.filename=d.qcow2", 1},
	} {
		cmd := exec.Command(instar, "map", "--untrusted", "--image-opts", c.name)
		cmd.Dir = filepath.Clean(dir)
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != c.code {
			t.Errorf("%s: %s", c.name, out)
		}
	}
}

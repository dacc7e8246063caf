// Package remote brings what is not a file into one: images behind http(s)
// URLs, fetched by ranges, and pipes of a known length. Plugins get descriptors
// and nothing else, so the bytes are put into a file without a name first, with
// holes where they are zeros.
package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	chunk    = 4 << 20 // bytes of one range request
	workers  = 4       // range requests under way at once
	attempts = 4       // of one range
	block    = 64 << 10
)

// IsURL reports whether a name given on the command line is fetched by Fetch.
func IsURL(name string) bool {
	return strings.HasPrefix(name, "http://") || strings.HasPrefix(name, "https://")
}

// Fetch brings the resource at url into a temporary file, by range requests
// that are repeated when a connection breaks. progress, which may be nil, is
// called with the bytes that are there.
func Fetch(ctx context.Context, url string, progress func(done, total int64)) (_ *os.File, err error) {
	client := &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: workers,
		ResponseHeaderTimeout: 60 * time.Second, TLSHandshakeTimeout: 30 * time.Second,
	}}
	defer client.CloseIdleConnections()
	r := &resource{client: client, url: url}
	if err := r.probe(ctx); err != nil {
		return nil, err
	}
	file, err := temporary()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	if err := file.Truncate(r.size); err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	return file, r.fetch(ctx, file, progress)
}

// temporary returns a file that has lost its name.
func temporary() (*os.File, error) {
	f, err := os.CreateTemp("", "instar-remote-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// resource is what a URL stands for.
type resource struct {
	client *http.Client
	url    string
	size   int64
	tag    string // of the version that is being fetched
}

// probe asks for the first byte, which tells the size and whether the server
// has ranges.
func (r *resource) probe(ctx context.Context) error {
	resp, err := r.get(ctx, 0, 0)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusPartialContent:
	case http.StatusRequestedRangeNotSatisfiable: // an empty file has no first byte
		if strings.TrimSpace(resp.Header.Get("Content-Range")) == "bytes */0" {
			return nil
		}
		return fmt.Errorf("%s: the server refuses a range of 1 byte", r.url)
	case http.StatusOK:
		if resp.ContentLength == 0 {
			return nil // nothing to ask ranges of
		}
		return fmt.Errorf("%s: the server does not serve ranges (no answer 206 to a range request); download the file first", r.url)
	default:
		return fmt.Errorf("%s: the server answers %s", r.url, resp.Status)
	}
	_, total, ok := strings.Cut(resp.Header.Get("Content-Range"), "/")
	r.size, err = strconv.ParseInt(total, 10, 64)
	if !ok || err != nil || r.size < 0 {
		return fmt.Errorf("%s: the server does not tell the length (Content-Range %q)", r.url, resp.Header.Get("Content-Range"))
	}
	if tag := resp.Header.Get("ETag"); tag != "" && !strings.HasPrefix(tag, "W/") {
		r.tag = tag
	}
	return nil
}

func (r *resource) get(ctx context.Context, first, last int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, last))
	req.Header.Set("Accept-Encoding", "identity")
	if r.tag != "" {
		req.Header.Set("If-Match", r.tag)
	}
	return r.client.Do(req)
}

// fetch fills the file.
func (r *resource) fetch(ctx context.Context, file *os.File, progress func(done, total int64)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	offsets := make(chan int64)
	var mu sync.Mutex
	var done int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			buf := make([]byte, chunk)
			for off := range offsets {
				n := min(chunk, r.size-off)
				if err := r.fetchRange(ctx, buf[:n], off); err != nil {
					cancel(err)
					return
				}
				if err := writeSparse(file, buf[:n], off); err != nil {
					cancel(fmt.Errorf("%s: %w", r.url, err))
					return
				}
				mu.Lock()
				done += n
				if progress != nil {
					progress(done, r.size)
				}
				mu.Unlock()
			}
		})
	}
feed:
	for off := int64(0); off < r.size; off += chunk {
		select {
		case offsets <- off:
		case <-ctx.Done():
			break feed
		}
	}
	close(offsets)
	wg.Wait()
	return context.Cause(ctx)
}

// errPermanent marks errors that another attempt would meet again.
var errPermanent = errors.New("permanent")

// fetchRange reads one range, again when the connection breaks.
func (r *resource) fetchRange(ctx context.Context, buf []byte, off int64) (err error) {
	for i := range attempts {
		if i > 0 {
			select {
			case <-time.After(time.Duration(i) * 200 * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err = r.tryRange(ctx, buf, off); err == nil || errors.Is(err, errPermanent) || ctx.Err() != nil {
			return err
		}
	}
	return err
}

func (r *resource) tryRange(ctx context.Context, buf []byte, off int64) error {
	last := off + int64(len(buf)) - 1
	resp, err := r.get(ctx, off, last)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPreconditionFailed:
		return fmt.Errorf("%s: the file changed while it was read (%w)", r.url, errPermanent)
	case resp.StatusCode >= 500:
		return fmt.Errorf("%s: the server answers %s", r.url, resp.Status)
	case resp.StatusCode != http.StatusPartialContent:
		return fmt.Errorf("%s: the server answers %s to a range (%w)", r.url, resp.Status, errPermanent)
	}
	if want := fmt.Sprintf("bytes %d-%d/%d", off, last, r.size); resp.Header.Get("Content-Range") != want {
		return fmt.Errorf("%s: the server sends %q where %q was asked for (%w)", r.url, resp.Header.Get("Content-Range"), want, errPermanent)
	}
	if _, err := io.ReadFull(resp.Body, buf); err != nil {
		return fmt.Errorf("%s: range at %d: %w", r.url, off, err)
	}
	return nil
}

var zeros [block]byte

// writeSparse writes b at off into a file full of holes, leaving the holes
// where b is zero.
func writeSparse(f *os.File, b []byte, off int64) error {
	for len(b) > 0 {
		n := min(block, len(b))
		if !bytes.Equal(b[:n], zeros[:n]) {
			if _, err := f.WriteAt(b[:n], off); err != nil {
				return err
			}
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// Spool brings size bytes of a stream into a temporary file. The stream must
// end there. progress, which may be nil, is called with the bytes that are there.
// The end of ctx ends it, though a read from the stream may then still wait.
func Spool(ctx context.Context, r io.Reader, name string, size int64, progress func(done, total int64)) (_ *os.File, err error) {
	file, err := temporary()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	if err := file.Truncate(size); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	next := chunks(ctx, r, size)
	for off := int64(0); off < size; {
		c, err := next()
		switch {
		case err != nil:
			return nil, err
		case c.err != nil:
			return nil, fmt.Errorf("%s: ends after %d bytes, %d were announced", name, off+int64(len(c.b)), size)
		}
		if err := writeSparse(file, c.b, off); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if off += int64(len(c.b)); progress != nil {
			progress(off, size)
		}
	}
	c, err := next()
	if err != nil {
		return nil, err
	}
	if len(c.b) > 0 || (c.err != nil && !errors.Is(c.err, io.EOF)) {
		return nil, fmt.Errorf("%s: goes on after the %d bytes that were announced", name, size)
	}
	return file, nil
}

// read is what one read of a stream brought.
type read struct {
	b   []byte
	err error
}

// chunks reads size bytes of a stream, and whether anything follows, in a
// goroutine of its own: nothing ends a read from a pipe. The function it returns
// waits for the next part, whose memory is the caller's until the next call.
func chunks(ctx context.Context, r io.Reader, size int64) func() (read, error) {
	parts := make(chan read)
	go func() {
		var bufs [2][]byte
		for i := 0; ; i++ {
			b := bufs[i%len(bufs)]
			if b == nil {
				b = make([]byte, 1<<20)
				bufs[i%len(bufs)] = b
			}
			want := min(int64(len(b)), size)
			size -= want
			last := want == 0
			var n int
			var err error
			if last {
				n, err = r.Read(b[:1])
			} else {
				n, err = io.ReadFull(r, b[:want])
			}
			select {
			case parts <- read{b[:n], err}:
			case <-ctx.Done():
				return
			}
			if last || err != nil {
				return
			}
		}
	}()
	return func() (read, error) {
		select {
		case p := <-parts:
			return p, nil
		case <-ctx.Done():
			return read{}, ctx.Err()
		}
	}
}

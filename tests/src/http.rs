//! As much HTTP as the lab needs. `GET /` greets, `GET /bytes/N` yields N bytes of a known pattern,
//! `PUT /` takes bytes and says whether they are that pattern.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::topology::Host;

const TIMEOUT: Duration = Duration::from_secs(10);

/// What `GET /` yields.
pub const GREETING: &str = "a page from the lab\n";

/// `len` bytes that do not repeat and do not compress, always the same.
pub fn pattern(len: usize) -> Vec<u8> {
    // xorshift64*, so that a lost, doubled or swapped segment cannot go unseen.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Fetches a path.
pub fn get(host: &Host, server: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    request(host, server, "GET", path, &[])
}

/// Downloads `len` bytes and checks every one.
pub fn download(host: &Host, server: SocketAddr, len: usize) -> anyhow::Result<()> {
    let body = get(host, server, &format!("/bytes/{len}"))?;
    intact(&body, len)
}

/// Uploads `len` bytes, which the server checks.
pub fn upload(host: &Host, server: SocketAddr, len: usize) -> anyhow::Result<()> {
    request(host, server, "PUT", "/", &pattern(len)).map(drop)
}

fn intact(body: &[u8], len: usize) -> anyhow::Result<()> {
    ensure!(body.len() == len, "{} bytes instead of {len}", body.len());
    match body.iter().zip(pattern(len)).position(|(a, b)| *a != b) {
        None => Ok(()),
        Some(at) => bail!("byte {at} of {len} is wrong"),
    }
}

/// Fetches a path from a local socket, e.g. the daemon's.
pub fn get_local(socket: &Path, path: &str) -> anyhow::Result<Vec<u8>> {
    let exchange = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        talk(stream, "local", "GET", path, &[])
    };
    exchange().with_context(|| format!("GET {path} from {}", socket.display()))
}

fn request(
    host: &Host,
    server: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let exchange = || {
        let stream = host.tcp_connect(server, TIMEOUT)?;
        talk(stream, &server.to_string(), method, path, body)
    };
    exchange().with_context(|| format!("{}: {method} http://{server}{path}", host.name()))
}

fn talk(
    mut stream: impl Read + Write,
    server: &str,
    method: &str,
    path: &str,
    body: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut stream = BufReader::new(stream);
    let (first, len) = read_head(&mut stream)?;
    let body = read_body(&mut stream, len)?;
    ensure!(
        first.contains(" 200 "),
        "{first}: {}",
        String::from_utf8_lossy(&body)
    );
    Ok(body)
}

/// A request, for servers of their own.
#[derive(Clone, Debug)]
pub struct Request {
    /// As `GET`.
    pub method: String,
    /// With what is behind a question mark.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Request {
    /// Reads one.
    pub fn read(stream: &TcpStream) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        reader.read_line(&mut first)?;
        let mut words = first.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next(), words.next());
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            ensure!(reader.read_line(&mut line)? > 0, "cut off in the head");
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut request = Self {
            method: method.context("no method")?,
            path: path.context("no path")?,
            headers,
            body: Vec::new(),
        };
        let length = request.header("content-length").unwrap_or("0").parse()?;
        request.body = read_body(&mut reader, length)?;
        Ok(request)
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Answers a request, and ends the connection. `status` is as `200 OK`.
pub fn answer(mut stream: &TcpStream, status: &str, body: &[u8]) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

/// Answers one request.
pub(crate) fn serve(stream: TcpStream) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let (first, len) = read_head(&mut reader)?;
    let words: Vec<&str> = first.split(' ').collect();
    let (status, body) = match words[..] {
        ["GET", "/", _] => ("200 OK", GREETING.as_bytes().to_vec()),
        ["GET", path, _] => match path.strip_prefix("/bytes/").map(str::parse) {
            Some(Ok(len)) => ("200 OK", pattern(len)),
            _ => ("404 Not Found", Vec::new()),
        },
        ["PUT", "/", _] => {
            let taken = read_body(&mut reader, len)
                .map_err(anyhow::Error::from)
                .and_then(|body| intact(&body, len));
            match taken {
                Ok(()) => ("200 OK", Vec::new()),
                Err(error) => ("400 Bad Request", format!("{error:#}").into_bytes()),
            }
        }
        _ => ("400 Bad Request", Vec::new()),
    };
    Ok(answer(&stream, status, &body)?)
}

/// The first line, and the length of the body that follows the head.
fn read_head(stream: &mut impl BufRead) -> anyhow::Result<(String, usize)> {
    let mut first = String::new();
    stream.read_line(&mut first)?;
    let mut len = 0;
    loop {
        let mut line = String::new();
        ensure!(stream.read_line(&mut line)? > 0, "cut off in the head");
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            return Ok((first.trim_end().to_owned(), len));
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            len = value.trim().parse().context("content-length")?;
        }
    }
}

fn read_body(stream: &mut impl BufRead, len: usize) -> io::Result<Vec<u8>> {
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_is_stable_and_every_change_is_seen() {
        let good = pattern(1001);
        assert_eq!(good.len(), 1001);
        assert_eq!(good[..500], pattern(500));
        assert!(intact(&good, 1001).is_ok());
        assert!(intact(&good[..1000], 1001).is_err());
        let mut swapped = good.clone();
        swapped.swap(10, 700);
        assert!(intact(&swapped, 1001).is_err());
    }
}
